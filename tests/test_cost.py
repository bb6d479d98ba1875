"""`python -m ivtp.cost`: the paper's figures from sizes alone, without network; and the arguments of the command."""

from __future__ import annotations

import json
import socket

import pytest

from ivtp.backbones.loading.hub import EMBEDDED
from ivtp.cost import main


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("ivtp.cost asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def printed(capsys, *arguments: str) -> dict:
    assert main([*arguments, "json=true"]) == 0
    out = capsys.readouterr().out
    assert len(out.strip().splitlines()) == 1
    return json.loads(out)


@pytest.mark.parametrize(
    ("model", "pruner", "tflops"),
    [
        ("llava_1_5_7b", "none", 15.404),
        ("llava_1_5_13b", "none", 29.353),
        ("llava_1_5_7b", "ivtp", 8.20),
        ("llava_1_5_13b", "ivtp", 15.59),
    ],
)
def test_the_paper_s_count_of_llava(capsys, model, pruner, tflops):
    arguments = (f"model={model}", f"pruner={pruner}", "text=512")
    run, found = printed(capsys, *arguments), printed(capsys, *arguments, "convention=paper")
    assert run["tflops"]["total"] < found["tflops"]["total"] and run["tokens"] == found["tokens"]
    digits = 3 if pruner == "none" else 2
    assert round(found["tflops"]["total"], digits) == tflops
    assert set(found["tflops"]) == {"vision", "projector", "language", "extra", "total"}
    parts = sum(value for part, value in found["tflops"].items() if part != "total")
    assert found["tflops"]["total"] == pytest.approx(parts, rel=1e-9)
    assert found["tokens"][0] == 576
    assert found["tokens"][-1] == (576 if pruner == "none" else 64)


def test_less_text_and_fewer_tokens_cost_less(capsys):
    def total(*arguments: str) -> float:
        return printed(capsys, "model=llava_1_5_7b", *arguments)["tflops"]["total"]

    assert total("text=40") < total("text=512")
    assert total("budget.keep=32", "text=512") < total("budget.keep=128", "text=512")
    assert total("text=512", "instruction=10") < total("text=512", "instruction=70")
    assert total("text=512") < total("text=512", "streamed=true")


def test_a_budget_in_tflops_is_met(capsys):
    found = printed(capsys, "model=llava_1_5_7b", "pruner=ivtp", "text=512", "budget.tflops=9")
    assert found["tflops"]["total"] == pytest.approx(9, rel=0.01)


def test_the_embedded_model_is_counted_without_its_weights(capsys, monkeypatch):
    monkeypatch.setattr("ivtp.api._from_pretrained", None)
    assert printed(capsys, "model=tiny", "text=12")["tokens"][0] == 324


def test_another_checkpoint_is_counted_by_its_own_sizes(capsys):
    """Not by those of the YAML, which are of the checkpoint that it names."""
    other = ("model=llava_1_5_7b", f"model.source={EMBEDDED['tiny']}", "model.text_encoder=null", "text=12")
    own = printed(capsys, "model=tiny", "text=12")
    assert printed(capsys, *other) == own
    assert printed(capsys, *other, "model.config.model_type=llava") != own  # somebody who gives sizes gets these
    encoder = ("model=open_clip_b16", "model.source=ViT-B-32", "pruner=topk")
    assert (
        printed(capsys, *encoder)["tokens"][0] < printed(capsys, *encoder, "model.architecture=ViT-B-16")["tokens"][0]
    )


def test_the_table_sets_the_pruner_beside_the_unpruned_model(capsys):
    assert main(["model=llava_1_5_7b", "pruner=ivtp", "text=512", "convention=paper"]) == 0
    shown = capsys.readouterr().out
    for text in ("unpruned", "ivtp", "15.4", "8.197", "TFLOPs"):
        assert text in shown
    assert "{" not in shown


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("text=0", "text=0 must be a whole number"),
        ("text=many", "text=many must be a whole number"),
        ("instruction=-1", "instruction=-1 must be"),
        ("json=yes", "json=yes must be true or false"),
        ("pruner=ivpt", "Did you mean 'ivtp'?"),
        ("budget.keep=577", "keep=577, but an image has 576 visual tokens"),
        ("budget.tflops=1000", "choose a budget in between"),
    ],
)
def test_what_cannot_be_counted_is_said_in_one_line(capsys, argument, said):
    assert main(["model=llava_1_5_7b", argument]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
