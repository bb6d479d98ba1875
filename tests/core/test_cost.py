"""Oracle 6: the closed form is what FlopCounterMode counts on the same run, to the integer, part by part."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import KEEP, TEXTS, VISION, images, inputs, llava, plan_of, vision_model

import ivtp
from ivtp.core.flops import Layers, Shape, cost
from ivtp.core.plan import Plan, Stage
from ivtp.core.schedule import Cut
from ivtp.core.scores import Layerwise, Rollout
from ivtp.evaluation.profiling import flop_counter

PARTS = ("vision", "projector", "language", "text_encoder", "pruner")


def counted(model, plan, run, rest: str) -> dict[str, int]:
    """FLOPs per part of `run()`; what is outside all parts (the LM head, a classifier) goes to `rest`."""
    total, stack, seen = Counter(), [rest], 0

    def attribute():
        nonlocal seen
        now = counter.get_total_flops()
        total[stack[-1]] += now - seen
        seen = now

    @contextmanager
    def part(name):
        attribute()
        stack.append(name)
        try:
            yield
        finally:
            attribute()
            stack.pop()

    with flop_counter() as counter, ivtp.prune(model, plan, part=part):
        run()
        attribute()
    return {name: total[name] for name in PARTS}


def agree(found, expected):
    assert found == {name: getattr(expected, name) for name in PARTS}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("group", [1, 2, 3, "all"])
@pytest.mark.parametrize("name", ivtp.list_pruners())
def test_llava_costs_what_the_counter_counts(name, group, kernel):
    model, batch = llava(kernel), inputs(TEXTS[1:2])
    del batch["attention_mask"]
    shape = ivtp.shape_of(model)
    settings = {"group": group, "language_group": group}
    plan = plan_of(name, model, keep=KEEP, **settings)
    if group != 3 and plan == plan_of(name, model, keep=KEEP):
        pytest.skip(f"{name} has no groups")
    words = batch["input_ids"].shape[1] - shape.patches
    read = len(_encoder().tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]) + 2
    expected = cost(shape, plan, words, read, streamed=True)
    agree(counted(model, plan, lambda: model(**batch), "language"), expected)
    assert expected.tokens[0] == shape.patches
    assert cost(shape, plan, words, read).pruner == 0


def _encoder():
    from ivtp.backbones.text.pairing import guide_for

    return guide_for(llava()).encoder


def test_an_instruction_beyond_clips_context_is_counted_in_chunks():
    model, batch = llava(), inputs(TEXTS[1:2])
    long = {k: v for k, v in batch.items() if k != "attention_mask"}
    long["input_ids"] = torch.cat([long["input_ids"], long["input_ids"][:, -12:].repeat(1, 3)], 1)
    plan = plan_of("ivtp", model)
    with ivtp.prune(model, plan) as run:
        model(**long)
    text = " ".join(word for word, _ in run.trace.words[0])
    read = len(_encoder().tokenizer(text, add_special_tokens=False)["input_ids"]) + 2
    assert read > 2 * _encoder().context
    words = long["input_ids"].shape[1] - 25
    expected = cost(ivtp.shape_of(model), plan, words, read, streamed=True)
    agree(counted(model, plan, lambda: model(**long), "language"), expected)


@pytest.mark.parametrize("group", [1, 3, "all"])
@pytest.mark.parametrize("name", ivtp.list_pruners())
@pytest.mark.parametrize("backbone", VISION)
def test_vision_towers_cost_what_the_counter_counts(backbone, name, group):
    """With class token, registers or pooling (where all patches judge), gated FFNs, a classifier or a projection."""
    model = vision_model(backbone)
    plan = plan_of(name, model, keep=KEEP, group=group)
    expected = cost(ivtp.shape_of(model), plan, streamed=True)
    found = counted(model, plan, lambda: model(images(1)), "vision")
    if backbone.startswith("openclip"):
        # What a score reads there is projected once more, which is no part of the method.
        assert found["pruner"] >= expected.pruner
        found["pruner"] = expected.pruner
    agree(found, expected)


@pytest.mark.parametrize("combine", ["residual", "mean", "max", "multiply"])
@pytest.mark.parametrize("after", ["attn", "block"])
def test_the_place_of_a_cut_and_every_combine_are_counted(after, combine):
    """Cutting behind the FFN instead of before costs FFN on pruned tokens: the paper's 8.2 against 8.3 TFLOPs."""
    model, batch = llava(), inputs(TEXTS[1:2])
    del batch["attention_mask"]
    plan = Plan(
        vision=Stage((Cut(1, 17, after), Cut(4, 11, after)), Rollout(combine)),
        language=Stage((Cut(0, 7, after), Cut(3, 3, after)), Layerwise()),
    )
    words = batch["input_ids"].shape[1] - 25
    agree(
        counted(model, plan, lambda: model(**batch), "language"), cost(ivtp.shape_of(model), plan, words, streamed=True)
    )


VIT_L = Layers(24, 1024, 4096, 16, 16, 64, 2)
CLIP_TEXT = {"text": Layers(12, 768, 3072, 12, 12, 64, 2), "text_context": 77, "joint": 768}
LLAVA_7B = Shape(
    VIT_L,
    576,
    588,
    read=23,
    projector_in=1024,
    language=Layers(32, 4096, 11008, 32, 32, 128, 3),
    vocabulary=32000,
    **CLIP_TEXT,
)
LLAVA = {"7B": LLAVA_7B, "13B": replace(LLAVA_7B, language=Layers(40, 5120, 13824, 40, 40, 128, 3))}


@pytest.mark.parametrize(("size", "whole", "pruned"), [("7B", 15.404, 8.20), ("13B", 29.353, 15.59)])
def test_the_papers_teraflops(size, whole, pruned):
    """Table 1 with 512 text tokens, in the paper's convention."""
    shape = LLAVA[size]
    assert cost(shape, Plan(), convention="paper").total / 1e12 == pytest.approx(whole, abs=5e-4)
    assert cost(shape, Plan()).total == cost(shape, Plan(), convention="paper").total - whole_layer(VIT_L, 577)
    plan = ivtp.load_pruner("ivtp", shape, keep=64)
    found = cost(shape, plan, text=512, convention="paper")
    assert found.total / 1e12 == pytest.approx(pruned, abs=0.03)
    assert found.tokens == (576, 480, 399, 333, 277, 231, 192, 160, 133, 111, 92, 77, 64)
    for name, expected in (("topk", 7.96), ("tome", 7.96)) if size == "7B" else ():
        settings = {"group": 3} if name == "tome" else {}
        found = cost(shape, ivtp.load_pruner(name, shape, keep=64, **settings), convention="paper")
        assert found.total / 1e12 == pytest.approx(expected, abs=0.04)


def whole_layer(stack: Layers, n: int) -> int:
    return stack.attention(n) + stack.mlp(n)


@pytest.mark.parametrize(
    ("size", "width", "ffn", "depth", "heads"), [("7B", 4096, 11008, 32, 32), ("13B", 5120, 13824, 40, 40)]
)
def test_a_config_alone_gives_the_shape(size, width, ffn, depth, heads):
    """Costs of models that do not fit the machine: no weights are needed, and the known CLIP is found by its sizes."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=width, intermediate_size=ffn, num_hidden_layers=depth, num_attention_heads=heads, vocab_size=32000
    )
    assert ivtp.shape_of(LlavaConfig(vision_config=vision, text_config=text)) == LLAVA[size]
