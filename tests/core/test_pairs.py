"""Cosines of pairs that are computed by rows choose the same tokens as the whole map, in a fraction of its memory."""

from __future__ import annotations

import pytest
import torch

import ivtp
from ivtp.core import pairs
from ivtp.core.choices import CutSizes
from ivtp.core.tokens import Tokens
from ivtp.evaluation.profiling import flop_counter, peak_bytes
from ivtp.pruners.cdpruner import ConditionalDpp
from ivtp.pruners.vispruner import ImportantAndDiverse

SELECTS = {"max_min": ivtp.core.selects.MaxMin(), "dpp": ConditionalDpp(), "doubles": ImportantAndDiverse(0.5)}


def sequence(b: int, v: int, padding: int) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(b, v, 24, generator=generator)
    vectors[:, 1::7] = vectors[:, ::7][:, : len(range(1, v, 7))]  # doubles
    visual, valid = torch.ones(b, v, dtype=torch.bool), torch.ones(b, v, dtype=torch.bool)
    valid[0, v - padding :] = False
    scores = torch.rand(b, v, generator=generator).masked_fill(~valid, float("-inf"))
    return scores, vectors, Tokens.of(vectors, visual, visual, valid=valid)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("select", SELECTS.values(), ids=SELECTS)
def test_rows_choose_what_the_map_chooses(select, padding, monkeypatch):
    scores, vectors, tokens = sequence(3, 301, padding)
    expected = select(scores, vectors, 40, tokens).index
    monkeypatch.setattr(pairs, "WHOLE", 300)
    monkeypatch.setattr(pairs, "ROWS", 64)
    assert torch.equal(select(scores, vectors, 40, tokens).index, expected)


@pytest.mark.parametrize("name", ["max_min", "dpp"])
@pytest.mark.parametrize("whole", [300, 301])
def test_the_rows_are_counted(name, whole, monkeypatch):
    monkeypatch.setattr(pairs, "WHOLE", whole)
    scores, vectors, tokens = sequence(1, 301, 0)
    sizes = CutSizes(group=1, n=301, v=301, keep=40, references=1, heads=1, kv_heads=1, head_width=24, width=24)
    with flop_counter() as counter:
        SELECTS[name](scores, vectors, 40, tokens)
    assert counter.get_total_flops() == SELECTS[name].flops(sizes)


@pytest.mark.parametrize("name", ["max_min", "doubles"])
def test_no_map_is_formed_of_many_vectors(name):
    v = pairs.WHOLE + 1000
    scores, vectors, tokens = sequence(1, v, 0)
    with torch.inference_mode():
        keep = v - 8 if name == "doubles" else 16
        peak = peak_bytes(lambda: SELECTS[name](scores, vectors, keep, tokens))
    assert peak < 4 * v * v / 2
