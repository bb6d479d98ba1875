"""Layers whose output nobody reads are not run, and the class token behind them is still that of the whole tower."""

from __future__ import annotations

import pytest
import torch
from conftest import KEEP, TEXTS, images, inputs, llava, plan_of, vision_model

import ivtp
from ivtp.backbones.vision.transformers import ClipVit
from ivtp.core.loop import traverse
from ivtp.core.plan import Stage
from ivtp.core.reduces import Merge
from ivtp.core.schedule import Cut
from ivtp.core.scores import Layerwise
from ivtp.core.selects import Bipartite, Keys

STAGES = {
    "nothing is cut": None,
    "in a layer that is read": Stage((Cut(2, 11),), Layerwise()),
    "before the FFN of the last layer": Stage((Cut(2, 17), Cut(6, 11)), Layerwise()),
    "behind the last layer": Stage((Cut(2, 17), Cut(6, 11, "block")), Layerwise()),
    "merged, with log sizes": Stage((Cut(2, 17), Cut(5, 11)), None, Bipartite(), Merge(), Keys(), proportional=True),
}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("feature", [6, 5, 3])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_the_class_token_is_that_of_the_whole_tower(stage, feature, kernel):
    model = llava(kernel).model.vision_tower
    part, whole = ClipVit(model, (feature,)), ClipVit(model)
    with torch.inference_mode():
        tokens, cuts = traverse(part, part.embed(images(2)), stage)
        expected, whole_cuts = traverse(whole, whole.embed(images(2)), stage)
        torch.testing.assert_close(part.class_token(tokens, stage), whole.norm(expected.x[:, 0]), rtol=1e-5, atol=1e-5)
    for cut, other in zip(cuts, whole_cuts, strict=True):
        assert torch.equal(cut.position, other.position)


def layers_run(model, plan) -> dict[str, list[int]]:
    """Layers of the tower whose attention and whose FFN run in a prefill, once for every call."""
    ran, hooks = {"attention": [], "ffn": []}, []
    for number, layer in enumerate(ClipVit(model.model.vision_tower).layers):
        for name, module in (("attention", layer.self_attn), ("ffn", layer.mlp)):
            hook = module.register_forward_pre_hook(lambda *_, name=name, number=number: ran[name].append(number))
            hooks.append(hook)
    with ivtp.prune(model, plan):
        model(**inputs(TEXTS[:2]))
    for hook in hooks:
        hook.remove()
    return ran


@pytest.mark.parametrize("name", ["none", "divprune", "fastv", "hiprune", "visionzip", "topk"])
def test_the_layer_behind_the_features_is_not_run(name):
    """hidden_states[-2] leaves the last layer but one of seven."""
    model = llava()
    ran = layers_run(model, plan_of(name, model, keep=KEEP))
    assert ran == {"attention": list(range(6)), "ffn": list(range(6))}


def test_a_cut_in_a_layer_that_nobody_reads_runs_its_attention_alone():
    model = llava()
    plan = ivtp.Plan(Stage((Cut(6, KEEP),), Layerwise()))
    assert layers_run(model, plan) == {"attention": list(range(7)), "ffn": list(range(6))}


def test_guidance_runs_the_last_layer_for_the_class_token():
    model = llava()
    plan = plan_of("ivtp", model, keep=KEEP)
    assert plan.reads_clip
    ran = layers_run(model, plan)
    assert ran["ffn"] == list(range(7))  # the FFN of the last layer reads one token


def test_towers_that_are_read_whole_are_run_whole():
    stack = ClipVit(vision_model("clip_sdpa"))
    assert stack.read == stack.depth
