"""Family × pruner × {keep all is the model, cut is masked, batch is ones, cached is recomputed}: the README's matrix."""

from collections import defaultdict

import pytest
import torch
from conftest import FIRST, close, same_tokens, settings_of, skip_unless_it_drops, untouched
from helpers.families import FAMILIES, SIZES, TEXTS, batch, encode, family, llava_onevision, photo
from helpers.place import DTYPE, placed
from helpers.reference_families import family_logits

import ivtp
from ivtp.core.plan import Plan

NEW = [name for name in FAMILIES if name != "llava"]
"""LLaVA-1.5 has the whole of test_every_pruner.py; here it stands for several images and prompts without any."""
PRUNERS = ivtp.list_pruners()
TOKENS = 3


KEEP = defaultdict(lambda: 11, llava_next=41, llava_onevision=41, internvl=15)
"""Visual tokens of an image that stay: some of each crop."""


def settings(name: str, model) -> tuple[dict, Plan]:
    """Settings (and the plan for one image) under which a method runs on these small models; skips, in words, where it cannot."""
    kind = model.config.model_type
    keep, sized = KEEP[kind], {} if kind == "llava" else {"image": SIZES.get(kind, (70, 56))}
    shape = ivtp.shape_of(model, **sized)
    asked = settings_of(name, keep=keep)
    if name == "vispruner":
        asked["important_ratio"] = 1.0  # its diverse part needs 8 tokens of every crop
    guided = model.config.vision_config.model_type == "clip_vision_model"
    if name == "ivtp" and not guided:
        asked["reference"] = "last"
    if name == "cdpruner" and not guided:
        pytest.skip("cdpruner compares patches with the instruction in CLIP's joint space, and this tower is no CLIP's")
    try:
        plan = ivtp.load_pruner(name, shape, **asked)
    except ValueError as error:
        for reason in ("class token", "CLS", "no product", "own size", "shrunk", "patches of a unit"):
            if reason in str(error):
                pytest.skip(f"{name} refuses this model: {error}")
        raise
    return asked, plan


def generate(model, inputs):
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=TOKENS, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits, 1)


def pruned(model, name, asked, inputs):
    with ivtp.prune(model, name, **asked) as run:
        sequences, logits = generate(model, inputs)
        return sequences, logits, run.trace


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("kind", NEW)
def test_keeping_everything_is_the_untouched_model(kind, name):
    """A method that keeps all tokens must not change a bit of what the family's own forward and generate give."""
    model, inputs = family(kind)[0], batch(kind)
    asked, plan = settings(name, model)
    if "keep" in asked:
        asked["keep"] = 10**6  # more than any image has
    expected = generate(model, inputs)
    actual = pruned(model, name, asked, inputs)
    untouched(actual[0], expected[0], plan)
    untouched(actual[1][:, FIRST], expected[1][:, FIRST], plan)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("kind", NEW)
def test_cutting_tokens_is_hiding_them_from_the_untouched_model(kind, name):
    """Logits of the prompt's end and of decoded tokens: positions (M-RoPE), caches, windows, newlines, taps are right."""
    model, inputs = family(kind)[0], batch(kind)
    asked, plan = settings(name, model)
    skip_unless_it_drops(name, plan)
    sequences, logits, trace = pruned(model, name, asked, inputs)
    full, seen = family_logits(model, inputs, sequences, trace)
    close(logits, full[:, inputs["input_ids"].shape[1] - 1 : -1], 3e-5)
    if name != "none":
        visual = (inputs["input_ids"] == model.config.image_token_id).sum(1)
        hidden = (inputs["attention_mask"].bool() & ~seen[:, : inputs["input_ids"].shape[1]]).sum(1)
        assert bool((hidden > visual // 4).all()), "hardly anything was cut"
    kept = trace.kept
    if kept is not None and name != "grid_stride":
        assert len({tuple(p[v].tolist()) for p, v in zip(kept.position, kept.valid, strict=True)}) > 1


def mixed(kind: str) -> tuple[list[str], list[list], dict]:
    """Prompts with one image, another size, two images, and none."""
    height, width = {"llava": (35, 35)}.get(kind, (84, 42))
    first, second, third = photo(height, width, 1), photo(width, height, 2), photo(70, 70, 3)
    texts = [*TEXTS, "the red cube"]
    images = [[first], [second], [third, first], []]
    return texts, images, encode(kind, texts, images)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_mixed_batch_is_its_prompts_alone(kind, name):
    """One image, another size, two images, none: nothing of a prompt's answer or tokens depends on its neighbours."""
    model = family(kind)[0]
    asked, plan = settings(name, model)
    if name == "downsample" and kind.startswith("llava_"):
        pytest.skip("downsample's budget must make a grid in every crop, and images of other sizes have other crops")
    texts, images, inputs = mixed(kind)
    _, together, trace = pruned(model, name, asked, inputs)
    for i in (3, 2, 0, 1):
        _, alone, own = pruned(model, name, asked, encode(kind, texts[i : i + 1], images[i : i + 1]))
        same = same_tokens(own.language, trace.language if images[i] else [], i)
        # In narrower numbers a cut in the tower may keep another patch.
        if same and (torch.float32 == DTYPE or plan.vision is None):
            close(together[i][FIRST], alone[0][FIRST], 3e-5)
        assert images[i] or not own.language


@pytest.mark.parametrize("words", ["all", "rt"])
@pytest.mark.parametrize("kind", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_pseudo_cls_without_clip(kind, words):
    """Towers that no text encoder is paired with: IVTP's second stage from the language model's own embeddings."""
    model, inputs = family(kind)[0], batch(kind)
    asked = {"keep": KEEP[kind], "words": words, "tau": -1.0}
    sequences, logits, trace = pruned(model, "ivtp", asked, inputs)
    assert all(any(fit is not None for _, fit in spoken) for spoken in trace.words)
    full, _ = family_logits(model, inputs, sequences, trace)
    close(logits, full[:, inputs["input_ids"].shape[1] - 1 : -1], 3e-5)
    last = pruned(model, "ivtp", {"keep": KEEP[kind], "reference": "last"}, inputs)[2]
    assert last.kept.position.tolist() != trace.kept.position.tolist()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["none", "rollout", "fastv", "ivtp"])
def test_a_mixed_batch_is_the_masked_model(kind, name):
    """Several images and prompts without any against the unmodified forward; "none" is the family's own answer."""
    model = family(kind)[0]
    _, _, inputs = mixed(kind)
    sequences, logits, trace = pruned(model, name, settings(name, model)[0], inputs)
    full, _ = family_logits(model, inputs, sequences, trace)
    close(logits, full[:, inputs["input_ids"].shape[1] - 1 : -1], 3e-5)
    if name == "none":
        close(logits, generate(model, inputs)[1], 3e-5)


def test_several_images_of_a_onevision_prompt_are_not_cut_into_crops():
    """As its processor and its forward have it; a prompt with one image in the same batch is."""
    model, processor, image = family("llava_onevision")
    pictures = [[photo(70, 56, 1), photo(56, 70, 2)], [photo(70, 56, 3)]]
    texts = [image * 2 + TEXTS[0], image + TEXTS[1]]
    inputs = placed(dict(processor(images=pictures, text=texts, return_tensors="pt", padding=True)))
    assert inputs["batch_num_images"].tolist() == [2, 1]
    for name in ("none", "topk", "fastv"):
        sequences, logits, trace = pruned(model, name, {} if name == "none" else {"keep": 15}, inputs)
        full, _ = family_logits(model, inputs, sequences, trace)
        close(logits, full[:, inputs["input_ids"].shape[1] - 1 : -1], 3e-5)
    assert trace.visual.tolist() == [50, 105]


def test_an_image_that_the_model_blends_is_cut_behind_the_tower_only():
    """OneVision interpolates what makes too many tokens (anyres_max): those are no patches any more."""
    model, processor, image = llava_onevision(limit=1)
    inputs = placed(dict(processor(images=[photo(70, 70)], text=[image + TEXTS[0]], return_tensors="pt")))
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 25 + 5 * 5 + 5
    expected = generate(model, inputs)[1]
    assert torch.equal(pruned(model, "none", {}, inputs)[1], expected)
    sequences, logits, trace = pruned(model, "fastv", {"keep": 11}, inputs)
    full, _ = family_logits(model, inputs, sequences, trace)
    close(logits, full[:, inputs["input_ids"].shape[1] - 1 : -1], 3e-5)
    with pytest.raises(ValueError, match="or prune in the language model only"), ivtp.prune(model, "topk", keep=11):
        model(**inputs)
