"""Every kind of budget, for methods that spend in different places, against a search over all numbers of tokens."""

from __future__ import annotations

import pytest

from ivtp.core.flops import Layers, Shape, cost
from ivtp.pruners import load_pruner
from ivtp.pruners.budget import KINDS, chosen, in_words, solve
from ivtp.registry import UserError

VIT = Layers(24, 1024, 4096, 16, 16, 64, 2)
LLM = Layers(32, 4096, 11008, 32, 32, 128, 3)
SHAPE = Shape(VIT, 576, 588, projector_in=1024, language=LLM, vocabulary=32000)
SMALL = Shape(
    Layers(13, 16, 32, 2, 2, 8, 2), 144, 48, projector_in=16, language=Layers(8, 16, 40, 2, 2, 8, 3), vocabulary=50
)
METHODS = ["ivtp", "topk", "fastv", "tome", "evit", "tome_plus", "downsample"]


def spending(name, shape=SHAPE):
    return lambda keep: cost(shape, load_pruner(name, shape, keep=keep))


def every(name):
    found = {}
    for keep in range(1, SMALL.patches + 1):
        try:
            found[keep] = spending(name, SMALL)(keep)
        except ValueError:
            continue
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_is_met_as_nearly_as_any_number_of_tokens_can(name):
    costs = every(name)
    low, high = min(c.total for c in costs.values()), max(c.total for c in costs.values())
    for share in (0.1, 0.37, 0.8):
        target = low + share * (high - low)
        keep = solve({"tflops": target / 1e12}, SMALL, spending(name, SMALL))
        assert abs(costs[keep].total - target) == min(abs(c.total - target) for c in costs.values())
    for target in (50, 71.3, 120):
        keep = solve({"average_tokens": target}, SMALL, spending(name, SMALL))
        assert abs(costs[keep].average_tokens - target) == min(abs(c.average_tokens - target) for c in costs.values())


def test_average_tokens_are_those_that_enter_a_language_layer():
    """FastV: 2 layers see all 576, 30 see what is kept; cut in the ViT, all 32 see the same."""
    assert spending("fastv")(64).average_tokens == pytest.approx((2 * 576 + 30 * 64) / 32)
    assert spending("topk")(64).average_tokens == 64
    # IVTP cuts in layers 2, 5, 8, 11: those still take in what the cut before them left.
    assert spending("ivtp")(64).average_tokens == pytest.approx((3 * 133 + 3 * 111 + 3 * 92 + 3 * 77 + 20 * 64) / 32)


def test_like_another_row_and_shares_and_counts():
    rows = {"ivtp": spending("ivtp")(64)}
    keep = solve({"like": "ivtp"}, SHAPE, spending("topk"), rows)
    assert abs(spending("topk")(keep).total / rows["ivtp"].total - 1) < 0.005
    assert solve({"keep": 16}, SHAPE, spending("topk")) == 16
    assert solve({"ratio": 0.111}, SHAPE, spending("topk")) == solve({"ratio": "1/9"}, SHAPE, spending("topk")) == 64
    assert solve({"ratio": "1/36"}, SHAPE, spending("topk")) == 16
    assert solve({"ratio": 1e-9}, SHAPE, spending("topk")) == 1


@pytest.mark.parametrize(
    ("budget", "said"),
    [({"ratio": "1/0"}, "1/0"), ({"ratio": "many"}, "many"), ({"ratio": "5/4"}, "at most 1"), ({"ratio": True}, "True"),
     ({"tflops": 99}, "between"), ({"average_tokens": 0.5}, "between"), ({"average_tokens": "x"}, "not a number"),
     ({"like": "nobody"}, "nobody"), ({"keep": 3, "tflops": 1}, "both"), ({"tokens": 3}, "tokens"), ({}, "no budget")],
)  # fmt: skip
def test_what_cannot_be_met_is_said(budget, said):
    with pytest.raises(UserError, match=said):
        solve(budget, SHAPE, spending("topk"))


def test_a_vision_tower_has_no_average_in_a_language_model():
    shape = Shape(VIT, 576, 588)
    with pytest.raises(UserError, match="language model"):
        solve({"average_tokens": 9}, shape, lambda keep: cost(shape, load_pruner("topk", shape, keep=keep)))


def test_a_method_that_cannot_go_below_some_count_says_where_it_ends():
    with pytest.raises(UserError, match=r"\(\d+ tokens\)"):
        solve({"tflops": 7.3}, SHAPE, lambda keep: cost(SHAPE, load_pruner("tome", SHAPE, keep=keep, group=6)))


def test_every_kind_is_told_in_words():
    told = [in_words({kind: 0.25}) for kind in KINDS]
    assert len(set(told)) == len(KINDS) and all("0.25" in t or "25 %" in t for t in told)
    assert chosen({"keep": None, "ratio": "1/9"}) == ("ratio", "1/9")
