"""FlashAttention and kernels of the hub: under pruning each is called by its own name, with the mask it expects."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from conftest import close, images, inputs, llava, plan_of, vision_model
from helpers.families import FAMILIES, batch, family
from helpers.flash import FILES, HUB, Flash
from helpers.towers import answers
from transformers import AttentionInterface, AttentionMaskInterface, integrations, modeling_flash_attention_utils
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ivtp
from backbones.test_families import pruned, settings
from ivtp.core.plan import NOTHING
from ivtp.registry import UserError

NAMES = [HUB, "flash_attention_2", "kernels-community/vllm-flash-attn3"]
# In the tower; in the language model; in both, by attention records; what keeps a number of its own of every image; what
# merges.
PRUNERS = ["none", "topk", "fastv", "ivtp", "rollout", "prumerge", "visionzip", "sparsevlm"]


@pytest.fixture
def flash(monkeypatch):
    """transformers' own FlashAttention path on a CPU, all of it but the library."""
    library = Flash()
    monkeypatch.setattr(integrations.hub_kernels, "get_kernel", library.load)
    monkeypatch.setattr(integrations.hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    return library


@cache
def copied(kind: str):
    """A family's model to be given another kernel, with what belongs to it."""
    from conftest import make_text_encoder
    from helpers.families import GUIDED

    model, processor, _ = family(kind)
    return ivtp.load_model(deepcopy(model), processor, make_text_encoder() if kind in GUIDED else None)[0]


def named(model, kernel: str):
    """The model under another kernel: of the hub as users load one, else by name alone, as if its library was there."""
    model.config._attn_implementation = "sdpa"
    if "/" in kernel:
        model.set_attn_implementation(kernel)
    model.config._attn_implementation = kernel
    return model


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_flash_attention_gives_what_sdpa_gives(kind, name, flash):
    """Logits of the prefill and of decoded tokens, and the tokens kept, for prompts of different lengths."""
    model, inputs = family(kind)[0], batch(kind)
    asked, _ = settings(name, model)
    if name == "prumerge":
        asked["adaptive"] = True
    kernel = NAMES[(list(FAMILIES).index(kind) + PRUNERS.index(name)) % len(NAMES)]
    _, expected, before = pruned(model, name, asked, inputs)
    _, logits, after = pruned(named(copied(kind), kernel), name, asked, inputs)
    close(logits, expected, 3e-5)
    for cut, other in zip(before.vision + before.language, after.vision + after.language, strict=True):
        assert torch.equal(cut.position[cut.valid], other.position[other.valid])
    assert set(flash.asked) == {FILES.get(kernel, kernel)}
    shape = ivtp.shape_of(model)
    with ivtp.prune(model, name, **asked) as run:
        plan = run.plan
    tower = (plan.vision or NOTHING).schedule.reach(shape.read or shape.vision.depth)[0]
    if shape.has_cls and plan.reads_clip and kind != "internvl":
        tower = shape.vision.depth  # guidance reads the class token behind the last layer
    assert len(flash.calls) == tower + 3 * shape.language.depth, "some layer's attention went elsewhere"
    # The prompts are padded; a decoded token is one query for each; images of one size are not, but Qwen packs them.
    packed = [lengths for how, lengths in flash.calls if how == "packed"]
    assert [1, 1, 1] in packed
    if kind.startswith("qwen"):
        assert len(flash.calls) == len(packed)


@pytest.mark.parametrize("backbone", ["clip", "siglip"])
@pytest.mark.parametrize("name", ["none", "topk", "layerwise", "prumerge", "evit"])
def test_towers_under_flash_attention(backbone, name, flash):
    model, pixels = vision_model(f"{backbone}_sdpa"), images(3)
    plan = plan_of(name, model, **({"adaptive": True} if name == "prumerge" else {}))
    with ivtp.prune(model, plan):
        expected = answers(backbone, model, pixels)
    model = named(deepcopy(model), HUB)
    with ivtp.prune(model, plan) as run:
        actual = answers(backbone, model, pixels)
    close(actual[1], expected[1])
    left = run.vision[-1].valid if run.vision else torch.ones(1, 1, dtype=torch.bool)
    real = torch.ones(actual[0].shape[:2], dtype=torch.bool)
    real[:, -left.shape[1] :] = left  # what a ragged method pads is nobody's
    close(actual[0][real], expected[0][real])
    assert flash.asked == [HUB] and len(flash.calls) == model.config.num_hidden_layers


def test_a_kernel_of_the_hub_that_transformers_loads_by_itself(flash):
    """`attn_implementation=` as users give it; a second model with another kernel makes transformers load again, and
    register anew, in the middle of a forward."""
    names = [HUB, "kernels-community/vllm-flash-attn3"]
    models = [deepcopy(llava()) for _ in names]
    for model, name in zip(models, names, strict=True):
        model.set_attn_implementation(name)
    plan, rows = plan_of("fastv", models[0]), inputs()
    with ivtp.prune(llava(), plan):
        expected = llava()(**rows).logits[:, -1]
    kernels = dict(ALL_ATTENTION_FUNCTIONS)
    with ivtp.prune(models[0], plan), ivtp.prune(models[1], plan):
        for model in models * 2:
            close(model(**rows).logits[:, -1], expected)
    assert flash.asked[-4:] == names * 2
    assert dict(ALL_ATTENTION_FUNCTIONS) == kernels
    assert [model.config._attn_implementation for model in models] == names


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "internvl"])
def test_a_kernel_without_bias_is_refused_before_any_work(kind, flash):
    """Proportional attention adds the log sizes of merged tokens to the logits."""
    model = named(copied(kind), HUB)
    plan = ivtp.load_pruner("topk", ivtp.shape_of(model), keep=5)
    plan.vision.__dict__["proportional"] = True
    for refused in (model, named(deepcopy(vision_model("clip_sdpa")), "flash_attention_3")):
        with pytest.raises(UserError, match=r"flash.*takes no attention bias.*'sdpa'"), ivtp.prune(refused, plan):
            pass
    assert flash.calls == []


def test_a_paged_kernel_is_refused():
    model = named(deepcopy(llava()), "paged|eager")
    with pytest.raises(UserError, match=r"'paged\|eager' reads a paged cache.*'eager'"), ivtp.prune(model, "none"):
        pass


def own_kernel(module, query, key, value, attention_mask, scaling, **_):
    assert module.config._attn_implementation == "of_ones_own"
    assert attention_mask is None or attention_mask.dtype == torch.bool
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    causal = attention_mask is None and module.is_causal and query.shape[2] > 1
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, scale=scaling, is_causal=causal
    )
    return output.transpose(1, 2), None


@pytest.mark.parametrize("masked", [True, False])
def test_a_kernel_of_ones_own(masked, flash):
    """Registered with transformers, with a mask function or, for prompts without padding, without."""
    AttentionInterface.register("of_ones_own", own_kernel)
    if masked:
        AttentionMaskInterface.register("of_ones_own", lambda **about: sdpa_mask(**about))
    model, rows = named(deepcopy(llava()), "of_ones_own"), inputs()
    one = {key: value[1:2] for key, value in rows.items()}
    plan = plan_of("fastv", model)
    for batch_ in (rows, one) if masked else (one,):
        with ivtp.prune(llava(), plan):
            expected = llava().generate(**batch_, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        with ivtp.prune(model, plan):
            actual = model.generate(**batch_, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        close(torch.stack(actual.logits), torch.stack(expected.logits))
    if not masked:
        with pytest.raises(UserError, match="no mask function"), ivtp.prune(model, plan):
            model(**rows)
