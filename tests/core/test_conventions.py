"""What others publish for the same model, from formulas written out here."""

from __future__ import annotations

import json

import pytest

from ivtp.core.conventions import CONVENTIONS, resampler
from ivtp.core.flops import Layers, Shape, cost
from ivtp.core.plan import Plan, Stage
from ivtp.core.schedule import Cut
from ivtp.core.scores import Random
from ivtp.cost import main

VIT = Layers(24, 1024, 4096, 16, 16, 64, 2)
SHAPE = Shape(VIT, 576, 588, projector_in=1024, language=Layers(32, 4096, 11008, 32, 32, 128, 3), vocabulary=32000)


def formula(counts, ffn_matrices, d=4096, m=11008):
    """Σ over layers of 4nd² + 2n²d + (2 or 3)·ndm, the published form."""
    return sum(4 * n * d**2 + 2 * n**2 * d + ffn_matrices * n * d * m for n in counts)


@pytest.mark.parametrize(("name", "published"), [("macs", 3.82), ("two_matrices", 5.97), ("one_more", 7.65)])
def test_the_published_number_of_the_unpruned_model(name, published):
    assert CONVENTIONS[name].count(SHAPE, Plan()) / 1e12 == pytest.approx(published, abs=0.005)


def test_cuts_count_where_they_are():
    chance = Random()
    plan = Plan(
        Stage((Cut(3, 200),), chance), Stage((Cut(-1, 150, "block"), Cut(1, 100, "block"), Cut(20, 40)), chance)
    )
    counts = [150, 150, *[100] * 19]
    between = 4 * 100 * 4096**2 + 2 * 100**2 * 4096 + 3 * 40 * 4096 * 11008  # layer 20 loses tokens before its FFN
    expected = formula(counts[:-1], 3) + between + formula([40] * 11, 3)
    assert CONVENTIONS["macs"].count(SHAPE, plan) == expected
    assert CONVENTIONS["two_matrices"].count(SHAPE, Plan(Stage((Cut(3, 64),), chance))) == 2 * formula([64] * 32, 2)
    assert CONVENTIONS["one_more"].count(SHAPE, Plan(Stage((Cut(3, 64),), chance))) == 2 * formula([65] * 32, 3)


def test_the_command_prints_them(capsys):
    assert main(["model=llava_1_5_7b", "pruner=none", "convention=all", "json=true"]) == 0
    spent = json.loads(capsys.readouterr().out)
    assert spent["tflops"]["total"] == pytest.approx(15.388, abs=5e-4)
    assert spent["conventions"]["paper"] == pytest.approx(15.404, abs=5e-4)
    assert [round(spent["conventions"][name], 2) for name in CONVENTIONS] == [3.82, 5.97, 7.65]
    assert main(["model=llava_1_5_7b", "pruner=none", "convention=macs"]) == 0
    assert "3.817" in capsys.readouterr().out
    assert main(["model=llava_1_5_7b", "convention=mac"]) == 2
    assert "Did you mean 'macs'" in capsys.readouterr().err


def test_a_resampler_costs_what_the_paper_prints_for_qwen():
    _, spent = resampler(SHAPE, 64)
    assert spent.total / 1e12 == pytest.approx(8.1, abs=0.2)
    assert spent.language == cost(SHAPE, Plan(Stage((Cut(0, 64),), Random()))).language
    assert spent.vision == cost(SHAPE, Plan()).vision  # it looks at the whole image
    d, n, k = 4096, 576, 64
    assert spent.projector == 2 * n * 1024 * d + 2 * (2 * n * d * d) + 2 * (2 * k * d * d) + 2 * (2 * k * n * d)
    assert spent.tokens == (576, 64)
    with pytest.raises(ValueError, match="language model"):
        resampler(Shape(VIT, 576, 588), 64)
