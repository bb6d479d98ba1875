"""Closed-form FLOPs of every family are those that torch counts while it answers about one image."""

from collections import defaultdict

import pytest
from helpers.families import FAMILIES, SIZES, TEXTS, batch, family

import ivtp
from ivtp.core.flops import cost
from ivtp.evaluation.profiling import count

KEEP = defaultdict(lambda: 11, llava_next=40, llava_onevision=40, internvl=15)
SIZED = SIZES | {"llava_next": (70, 70), "llava_onevision": (70, 70), "qwen2_5_vl": (84, 56)}
"""Crops without padding to take out, windows that are all full: what the closed form is about."""


def compared(kind: str, name: str, **settings) -> tuple[dict, dict]:
    model = family(kind)[0]
    inputs = batch(kind, TEXTS[:1], SIZED[kind])
    shape = ivtp.shape_of(model, *([] if kind == "llava" else [SIZED[kind]]))
    plan = ivtp.load_pruner(name, shape, **settings)
    image = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert image == shape.tokens + shape.separators
    text = inputs["input_ids"].shape[1] - image
    closed = cost(shape, plan, text, streamed=True)
    counted = count(model, plan, lambda: model(**inputs), TEXTS[0])
    parts = ("vision", "projector", "language", "pruner", "total")
    return {part: getattr(closed, part) for part in parts}, {part: counted[part] for part in parts}


@pytest.mark.parametrize("name", ["none", "fastv", "random", "pdrop"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_family_costs_is_what_torch_counts(kind, name):
    """Crops, newlines, merge units, the merger and its taps: a table of costs must not be off by one of them."""
    closed, counted = compared(kind, name, **({} if name == "none" else {"keep": KEEP[kind]}))
    if kind == "qwen2_5_vl" and name == "random":
        # Where the cut leaves them in the windows differs from image to image; the closed form spreads them evenly.
        assert abs(closed.pop("vision") / counted.pop("vision") - 1) < 0.02
        closed.pop("total"), counted.pop("total")
    assert closed == counted


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "qwen3_vl", "internvl"])
def test_scores_in_a_tower_cost_what_torch_counts(kind):
    """`streamed=true`, with a class token and without: the score's products over the patches of a crop or an image."""
    closed, counted = compared(kind, "rollout", keep=KEEP[kind])
    assert closed == counted
