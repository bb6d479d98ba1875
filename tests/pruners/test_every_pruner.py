"""Oracles 1–4 of the design, over every registered pruner and every backbone: to register is to be tested."""

import pytest
import torch
from conftest import (
    FIRST,
    IMAGE,
    PATCHES,
    TEXTS,
    VISION,
    close,
    images,
    inputs,
    llava,
    plan_of,
    same_tokens,
    skip_unless_it_drops,
    untouched,
    vision_model,
)
from helpers.place import ROUNDING
from helpers.reference import llava_logits
from helpers.towers import answers, left, masked, pooled, prefix

import ivtp

PRUNERS = ivtp.list_pruners()
TOKENS = 4
BLIND = {"grid_stride"}
"""Pruners that do not look at the image: they keep the same patches of every one."""


def drops(name: str, model, **settings):
    """The plan of a pruner that only drops; skips for all others."""
    plan = plan_of(name, model, **settings)
    skip_unless_it_drops(name, plan)
    if plan.vision is None and plan.language is None:
        pytest.skip(f"{name} prunes nothing; keep-everything covers it")
    return plan


def generate(model, batch, **settings):
    settings = {"do_sample": False, "max_new_tokens": TOKENS, **settings}
    out = model.generate(**batch, **settings, return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1)


def remaining(ids, mask, kept, sample: int, image: int = IMAGE):
    """Where the real tokens of one prompt stand in the shortened sequence (a ragged method pads its slots)."""
    places = (ids == image).nonzero()[:, 0]
    _, order = kept.position[sample].sort()
    slots = kept.valid[sample][order]
    real = torch.cat([mask[: places[0]].bool(), slots, mask[places[-1] + 1 :].bool()])
    return real.nonzero()[:, 0]


# 1. keep everything = the untouched model, bit for bit


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("backbone", VISION)
def test_keeping_every_patch_leaves_a_vision_tower_untouched(name, backbone):
    model, pixels = vision_model(backbone), images(3)
    plan = plan_of(name, model, keep=PATCHES)
    expected = answers(backbone, model, pixels)
    with ivtp.prune(model, plan):
        actual = answers(backbone, model, pixels)
    for a, e in zip(actual, expected, strict=True):
        untouched(a, e, plan)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PRUNERS)
def test_keeping_every_token_leaves_the_logits_of_a_padded_batch_untouched(name, kernel):
    """With and without position ids, with the pseudo CLS appended and gone again."""
    model = llava(kernel)
    plan = plan_of(name, model, keep=PATCHES)
    padded, alone = inputs(), inputs(TEXTS[1:2])
    for batch in (padded, alone, {k: v for k, v in alone.items() if k != "attention_mask"}):
        valid = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        expected = model(**batch).logits
        with ivtp.prune(model, plan):
            actual = model(**batch).logits
        assert actual.shape == expected.shape
        untouched(actual[valid], expected[valid], plan)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PRUNERS)
def test_keeping_every_token_leaves_generation_untouched(name, kernel):
    model, batch = llava(kernel), inputs()
    plan = plan_of(name, model, keep=PATCHES)
    expected = generate(model, batch)
    for positions in ("keep", "renumber"):
        with ivtp.prune(model, plan_of(name, model, keep=PATCHES, position_ids=positions)):
            actual = generate(model, batch)
        untouched(actual[0], expected[0], plan)
        untouched(actual[1][:, FIRST], expected[1][:, FIRST], plan)
    assert plan.position_ids == "keep"


# 2. removing tokens = hiding them from the unmodified model


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("backbone", VISION)
def test_dropping_patches_is_hiding_them_from_the_unmodified_tower(name, backbone):
    model, pixels = vision_model(backbone), images(3)
    plan = drops(name, model)
    with ivtp.prune(model, plan) as run:
        actual, head = answers(backbone, model, pixels)
    assert [cut.position.shape[1] for cut in run.vision] == [cut.keep for cut in plan.vision.schedule]
    last, before = run.vision[-1].position, prefix(backbone, model)
    assert len({tuple(row) for row in last.tolist()}) > 1 or name in BLIND, "all samples kept the same patches"
    full = masked(backbone, model, pixels, run.vision)
    for sample, (kept, real) in enumerate(zip(last, run.vision[-1].valid, strict=True)):
        # A ragged method pads its slots: those are nobody's, and what pools the patches must not read them either.
        expected = full[sample, left(kept, real, before)]
        close(actual[sample, torch.cat([real.new_ones(before), real])], expected)
        close(head[sample], pooled(backbone, model, expected[None])[0])


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PRUNERS)
def test_dropping_tokens_is_hiding_them_from_the_unmodified_llava(name, kernel, positions):
    """Prefill logits of every surviving token, then the logits of decoded ones (oracle 4): the cache holds the right
    keys for each layer, tokens keep (or close up) their positions, and the pseudo CLS is not remembered."""
    model, batch = llava(kernel), inputs()
    plan = drops(name, model, position_ids=positions)
    renumber = positions == "renumber"
    with ivtp.prune(model, plan) as run:
        short = model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp_min(0)).logits
        sequences, decoded = generate(model, batch)
        vision, language = run.trace.vision, run.trace.language
    run_kept = run.trace.kept
    assert run_kept.position.shape == (3, plan.final)
    different = len({tuple(row) for row in run_kept.position.tolist()})
    assert different > 1 or name in BLIND, "all samples kept the same patches"

    mask = batch["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(3, TOKENS)], 1)
    full, seen = llava_logits(model, sequences, batch["pixel_values"], mask, vision, language, renumber=renumber)
    n = batch["input_ids"].shape[1]
    close(decoded, full[:, n - 1 : -1])
    expected = torch.cat([row[keep] for row, keep in zip(full[:, :n], seen[:, :n], strict=True)])
    left = [remaining(batch["input_ids"][i], batch["attention_mask"][i], run_kept, i) for i in range(3)]
    close(torch.cat([row[index] for row, index in zip(short, left, strict=True)]), expected)


# 3. a batch with padding = its samples alone


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("backbone", ["timm_avg", "timm_eva02", "clip_sdpa", "siglip_sdpa", "openclip_tok"])
def test_an_image_is_pruned_the_same_in_any_batch(name, backbone):
    model, pixels = vision_model(backbone), images(3)
    plan = plan_of(name, model)
    with ivtp.prune(model, plan) as run:
        together = answers(backbone, model, pixels)[1]
        cuts = run.vision
        for i in (2, 0, 1):
            alone = answers(backbone, model, pixels[i : i + 1])[1][0]
            if same_tokens(run.vision or [], cuts or [], i):
                close(alone, together[i])


@pytest.mark.parametrize("positions", ["generate", "forward"])
@pytest.mark.parametrize("name", [*PRUNERS, "ivtp choosing at random"])
def test_a_prompt_is_pruned_the_same_in_any_padded_batch(name, positions):
    """Logits and kept tokens; `forward` counts positions from the padding on, `generate` from the first real token."""
    model, batch = llava(), inputs()
    if name == "ivtp choosing at random":
        plan = plan_of("ivtp", model, language_score="random", vision_score="random", language_group=1)
    else:
        plan = plan_of(name, model)

    def answer(batch):
        if positions == "generate":
            return generate(model, batch, max_new_tokens=2)[1]
        return model(**batch).logits[:, -1:]

    with ivtp.prune(model, plan) as run:
        together = answer(batch)
        cuts = [*run.trace.vision, *run.trace.language]
        words = run.trace.words
        for i, text in enumerate(TEXTS):
            alone = answer(inputs([text]))[0]
            if same_tokens([*run.trace.vision, *run.trace.language], cuts, i):
                close(alone[FIRST], together[i][FIRST], 3e-5)
            if words is not None:
                assert [w for w, _ in run.trace.words[0]] == [w for w, _ in words[i]]
                relevance = [[c for _, c in found] for found in (run.trace.words[0], words[i])]
                torch.testing.assert_close(*relevance, atol=1e-5 * ROUNDING, rtol=0)


# 4. decoding strategies of transformers


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize(
    "strategy",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["beams", "three beams returned", "two samples"],
)
def test_beams_and_samples_decode_as_if_recomputed(name, strategy):
    """Every decoded sequence's own logits: with beams the cache is reordered, with samples it is repeated."""
    model, batch = llava(), inputs()
    plan = drops(name, model)
    torch.manual_seed(7)
    with ivtp.prune(model, plan) as run:
        out = model.generate(
            **batch,
            **{"do_sample": False, **strategy},
            max_new_tokens=TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        repeat = out.sequences.shape[0] // 3
        beams = strategy.get("num_beams", 1)
        first = slice(None, None, run.trace.kept.position.shape[0] // 3)
        cuts = [
            [
                type(c)(
                    c.layer,
                    c.after,
                    c.position[first].repeat_interleave(repeat, 0),
                    c.valid[first].repeat_interleave(repeat, 0),
                )
                for c in site
            ]
            for site in (run.trace.vision, run.trace.language)
        ]
    mask = batch["attention_mask"].repeat_interleave(repeat, 0)
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], TOKENS)], 1)
    n = batch["input_ids"].shape[1]
    full, _ = llava_logits(model, out.sequences, batch["pixel_values"].repeat_interleave(repeat, 0), mask, *cuts)
    logits = torch.stack(out.logits, 1)
    if beams == 1:
        close(logits, full[:, n - 1 : -1])
        return
    for row in range(out.sequences.shape[0]):
        for step in range(TOKENS):
            close(logits[out.beam_indices[row, step], step], full[row, n - 1 + step])


@pytest.mark.parametrize("name", PRUNERS)
def test_generation_without_a_cache_reads_the_same_image(name):
    """use_cache=False runs the whole pruned prefill for every token; the first token must not notice."""
    model, batch = llava(), inputs()
    plan = plan_of(name, model)
    with ivtp.prune(model, plan):
        _, cached = generate(model, batch, max_new_tokens=1)
        _, whole = generate(model, batch, max_new_tokens=1, use_cache=False)
    close(whole, cached)
