"""LLaVA under a plan: the paper's method written out independently, and what a user can ask of the pruned model."""

import inspect

import pytest
import torch
from conftest import IMAGE, KEEP, PATCHES, TEXTS, close, inputs, llava, make_llava, word_tokenizer
from helpers.reference import hidden_from, ivtp_language, ivtp_vision, llava_logits
from torch import nn
from transformers import DynamicCache

import ivtp
from ivtp.core.plan import Plan, Stage
from ivtp.core.schedule import Cut
from ivtp.core.scores import Layerwise, Random, Rollout


def positions(batch):
    return (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_ivtp_keeps_what_its_equations_say(group, kernel):
    """Eq. 2–4 and 8 in float64 on the full sequence, dense maps, both stages: the same tokens stay at every cut."""
    model, batch = llava(kernel), inputs()
    plan = ivtp.load_pruner("ivtp", ivtp.shape_of(model), keep=KEEP, group=group, language_group=group, tau=0.1)
    with ivtp.prune(model, plan) as run:
        model(**batch, position_ids=positions(batch))
    trace = run.trace

    kept, states, hidden = ivtp_vision(model.model.vision_tower, batch["pixel_values"], plan.vision.schedule)
    for cut, expected in zip(trace.vision, kept, strict=True):
        assert torch.equal(cut.position, expected), f"ViT layer {cut.layer}"

    embed, image = model.get_input_embeddings(), batch["input_ids"] == IMAGE
    pseudo = []
    for row, words in zip(batch["input_ids"], trace.words, strict=True):
        ids = [i for i in row.tolist() if i > IMAGE]
        assert word_tokenizer().decode(ids).split() == [word for word, _ in words]
        chosen = [i for i, (_, relevance) in zip(ids, words, strict=True) if relevance >= 0.1]
        assert 0 < len(chosen) < len(ids), "the threshold must separate words here"
        pseudo.append(embed(torch.tensor(chosen)).mean(0))
    features = model.model.multi_modal_projector(states[-2][:, 1:])
    x = embed(batch["input_ids"]).masked_scatter(image[:, :, None], features)
    kept = ivtp_language(
        model, x, batch["attention_mask"].bool(), image, hidden, plan.language.schedule, torch.stack(pseudo), plan.part1
    )
    for cut, expected in zip(trace.language, kept, strict=True):
        assert torch.equal(cut.position, expected), f"LLM layer {cut.layer}"


@pytest.mark.parametrize("reference", ["last", "visual_cls", "pseudo_cls"])
def test_who_judges_inside_the_language_model_changes_what_is_kept(reference):
    """A setting that is read but not used would make an ablation's rows equal."""
    model, batch = llava(), inputs()
    kept = {}
    for who in ("last", "visual_cls", "pseudo_cls"):
        with ivtp.prune(model, "ivtp", keep=KEEP, vision_keep=PATCHES, tau=0.1, reference=who) as run:
            model(**batch)
        kept[who] = run.trace.kept.position.tolist()
        assert (run.trace.words is not None) == (who == "pseudo_cls")
    assert all(kept[reference] != kept[other] for other in kept if other != reference)


def test_no_relevant_word_means_the_projected_visual_cls_judges():
    """τ out of reach: Eq. 8's fallback, which is the setting reference='visual_cls'."""
    model, batch = llava(), inputs()
    runs = []
    for settings in ({"tau": 2.0}, {"reference": "visual_cls"}, {"tau": -2.0}):
        with ivtp.prune(model, "ivtp", keep=KEEP, vision_keep=PATCHES, **settings) as run:
            logits = model(**batch).logits
        runs.append((run.trace.kept.position, logits))
    assert torch.equal(runs[0][0], runs[1][0])
    close(runs[0][1][:, -1], runs[1][1][:, -1])
    assert not torch.equal(runs[0][0], runs[2][0])


LANGUAGE = {
    "before the first layer": Stage((Cut(-1, 7, "block"), Cut(3, 5)), Random()),
    "once, after layer 1": Stage((Cut(1, 6, "block"),), Layerwise()),
    "in neighbouring layers and the last": Stage((Cut(2, 9, "attn"), Cut(3, 4, "block"), Cut(8, 3)), Rollout()),
    "twice in one layer": Stage((Cut(2, 9, "attn"), Cut(2, 4, "block")), Random()),
}


@pytest.mark.parametrize("where", LANGUAGE)
def test_any_schedule_in_the_language_model_equals_masks_and_batches_of_one(where):
    """A plan written by hand: cuts before the first layer, after whole layers, twice in a layer, in the last layer."""
    model, batch, plan = llava(), inputs(), Plan(language=LANGUAGE[where])
    with ivtp.prune(model, plan) as run:
        out = model.generate(
            **batch, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        cuts = run.trace.language
        for i, text in enumerate(TEXTS):
            model(**inputs([text]))
            for alone, batched in zip(run.trace.language, cuts, strict=True):
                assert torch.equal(alone.position[0], batched.position[i]), "the batch's padding changed what is kept"
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 3, dtype=torch.long)], 1)
    full, _ = llava_logits(model, out.sequences, batch["pixel_values"], mask, [], cuts)
    close(torch.stack(out.logits, 1), full[:, batch["input_ids"].shape[1] - 1 : -1])


def test_early_layers_remember_what_later_layers_pruned():
    """The cache of every layer is as long as the sequence was in it: a pseudo CLS in it would be one too many."""
    model, batch = llava(), inputs(TEXTS[:1])
    with ivtp.prune(model, "ivtp", keep=4, tau=0.1, language_group=1) as run:
        cache = model(**batch, use_cache=True).past_key_values
    counts = {cut.layer: cut.position.shape[1] for cut in run.trace.language}
    text, v = batch["input_ids"].shape[1] - PATCHES, run.trace.vision[-1].position.shape[1]
    for number, layer in enumerate(cache.layers):
        assert layer.keys.shape[2] == layer.values.shape[2] == text + v
        v = counts.get(number, v)
    assert v == 4


@pytest.mark.parametrize("text", [True, False], ids=["with a mask", "without a mask"])
def test_a_cache_can_be_continued_by_hand(text):
    """Prefill, then several tokens at once through `forward`, as `generate` would feed them one by one; a padded
    prefill without position ids counts from the padding, and so must its continuation."""
    model, batch = llava(), inputs(TEXTS if text else TEXTS[:1])
    if not text:
        batch.pop("attention_mask")
    b, n = batch["input_ids"].shape
    more = torch.randint(5, 20, (b, 4), generator=torch.Generator().manual_seed(1))
    with ivtp.prune(model, "ivtp", keep=KEEP, tau=0.1) as run:
        cache = model(**batch, use_cache=True).past_key_values
        first = model(input_ids=more[:, :3], past_key_values=cache).logits
        last = model(input_ids=more[:, 3:], past_key_values=cache).logits
    mask = batch.get("attention_mask", torch.ones(b, n, dtype=torch.long))
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    full, _ = llava_logits(
        model,
        torch.cat([batch["input_ids"], more], 1),
        batch["pixel_values"],
        mask,
        run.trace.vision,
        run.trace.language,
        position_ids=torch.arange(n + 4).expand(b, -1),
    )
    close(torch.cat([first, last], 1), full[:, n:])


def test_the_early_answer_is_read_behind_part_1():
    """acc_early: final norm and LM head on the last prompt token's state after part 1, and nothing else changes."""
    model, batch = llava(), inputs()
    with ivtp.prune(model, "ivtp", keep=KEEP, tau=0.1, read_early=True) as run:
        logits, early = model(**batch).logits, run.trace.early
    with ivtp.prune(model, "ivtp", keep=KEEP, tau=0.1) as run:
        assert torch.equal(model(**batch).logits, logits)
    assert run.trace.early is None
    part1 = 3
    layers = model.model.language_model.layers
    try:  # the unmodified model, cut off after part 1
        model.model.language_model.layers = layers[:part1]
        model.config.text_config.num_hidden_layers = part1
        full, _ = llava_logits(
            model, **{k: batch[k] for k in batch}, vision=run.trace.vision, language=run.trace.language
        )
    finally:
        model.model.language_model.layers = layers
        model.config.text_config.num_hidden_layers = len(layers)
    close(early, full[:, -1])
    with ivtp.prune(model, "none", read_early=True) as run:
        model(**batch)
    assert run.trace.early is not None
    assert not torch.allclose(run.trace.early, early)


@pytest.mark.parametrize("features", [-1, -3, [-3, -2], [2, 5, 7]])
def test_any_feature_layer_reaches_the_projector_as_unpruned(features):
    """LLaVA variants read other layers, or several: nothing changes with all kept, and pruned it is masks."""
    count = 1 if isinstance(features, int) else len(features)
    model = make_llava()
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = features
    model.model.multi_modal_projector.linear_1 = nn.Linear(24 * count, 42).requires_grad_(False)
    batch = inputs(TEXTS[:2])
    expected = model(**batch).logits
    with ivtp.prune(model, "topk", keep=PATCHES):
        valid = batch["attention_mask"].bool()
        assert torch.equal(model(**batch).logits[valid], expected[valid])
    with ivtp.prune(model, "rollout", keep=KEEP) as run:
        pruned = model(**batch).logits[:, -1]
    if isinstance(features, int):
        full, _ = llava_logits(
            model,
            **batch,
            vision=run.trace.vision,
            language=[],
            position_ids=torch.arange(batch["input_ids"].shape[1]).expand(2, -1),
        )
        close(pruned, full[:, -1])


def snapshot(model):
    """Everything a context could leave behind: attributes of every module, hooks, the configs."""
    found = {}
    for name, module in model.named_modules():
        found[name] = {k: id(v) for k, v in vars(module).items() if k not in ("_parameters", "_modules", "_buffers")}
        found[name] |= {f"{k} hooks": len(v) for k, v in vars(module).items() if isinstance(v, dict)}
    configs = [model.config, model.config.vision_config, model.config.text_config]
    return (
        found,
        [(c._attn_implementation, c.to_json_string()) for c in configs],
        inspect.getsource(type(model).forward),
    )


@pytest.mark.parametrize("name", ["ivtp", "tome"])
def test_leaving_the_context_leaves_the_model_as_it_was(name):
    """Also by an exception in the middle of a layer, and from inside another context."""
    model, batch = llava(), inputs()
    expected = model(**batch).logits
    before = snapshot(model)
    with ivtp.prune(model, name, keep=9):
        outer = model(**batch).logits
        inside = snapshot(model)
        with ivtp.prune(model, "random", keep=4):
            inner = model(**batch).logits
        assert snapshot(model) == inside
        assert torch.equal(model(**batch).logits, outer)
    assert outer.shape != inner.shape
    assert snapshot(model) == before
    assert torch.equal(model(**batch).logits, expected)

    class Interrupted(Exception):
        pass

    def fail(*_):
        raise Interrupted

    for module in (
        model.model.language_model.layers[1].self_attn.o_proj,
        model.model.vision_tower.encoder.layers[2].self_attn.out_proj,
        model.model.vision_tower.encoder.layers[2].mlp,
    ):
        hook = module.register_forward_hook(fail)
        with pytest.raises(Interrupted), ivtp.prune(model, name, keep=9):
            model.generate(**batch, max_new_tokens=2)
        hook.remove()
        assert [v for k, v in snapshot(model)[1]] == [v for k, v in before[1]]
        assert [k for k, v in snapshot(model)[1]] == [k for k, v in before[1]]
        assert torch.equal(model(**batch).logits, expected)


def test_beams_of_one_image_are_one_pass_and_equal_images_too():
    """Two questions about one image, and another image between them: every prompt gets its own image's features."""
    model = llava()
    batch = inputs()
    batch["pixel_values"] = batch["pixel_values"][[0, 1, 0]]
    with ivtp.prune(model, "rollout", keep=KEEP) as run:
        together = model(**batch).logits[:, -1]
        cuts = run.trace.vision
        assert torch.equal(cuts[-1].position[0], cuts[-1].position[2])
        assert not torch.equal(cuts[-1].position[0], cuts[-1].position[1])
        for i in range(3):
            alone = {k: v[i : i + 1] for k, v in batch.items()}
            close(model(**alone).logits[0, -1], together[i])


def test_a_cache_of_another_run_is_refused():
    """Its layers have other lengths than this plan's; decoding on it would be silently wrong."""
    model, batch = llava(), inputs(TEXTS[:1])
    cache = model(**batch, use_cache=True).past_key_values
    with ivtp.prune(model, "topk", keep=KEEP), pytest.raises(ValueError, match="not filled under the pruning"):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    with pytest.raises(ValueError, match="dynamic"), ivtp.prune(model, "topk", keep=KEEP):
        model.generate(**batch, max_new_tokens=2, cache_implementation="static")
    assert isinstance(cache, DynamicCache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["input_ids"].masked_fill_(b["input_ids"] == IMAGE, 7), "3 images, but the 3 prompts .* for 0"),
        (lambda b: b["input_ids"][1, -PATCHES:].fill_(IMAGE), r"prompt 1 of the batch has \d+ image tokens"),
        (lambda b: b.update(pixel_values=b["pixel_values"][:2]), "prompt 2 of the batch has 25 .* none is left"),
        (lambda b: b.pop("pixel_values"), "prompt 0 of the batch has 25 .* none is left"),
        (lambda b: b.update(output_attentions=True), "output_attentions=True"),
        (lambda b: b.update(output_hidden_states=True), "output_hidden_states=True"),
        (lambda b: b.update(vision_feature_layer=-1), "vision_feature_layer"),
        (lambda b: b.update({k: b[k].flip(1) for k in ("input_ids", "attention_mask")}), "pad on the left"),
    ],
    ids=["no image", "two images", "an image too few", "no pixels", "attentions", "states", "feature layer", "padding"],
)
def test_what_cannot_be_pruned_is_refused_in_one_line(change, message):
    batch = inputs()
    change(batch)
    with ivtp.prune(llava(), "ivtp", keep=KEEP), pytest.raises(ValueError, match=message) as error:
        llava()(**batch)
    assert "\n" not in str(error.value)


def test_an_instruction_that_is_not_in_the_prompt_is_refused():
    """Guidance by another question would silently be the fallback."""
    wrong = pytest.raises(ValueError, match="does not occur in prompt 0")
    with wrong, ivtp.prune(llava(), "ivtp", keep=KEEP, instruction="is it raining ?"):
        llava()(**inputs(TEXTS[:1]))


def test_the_instruction_says_which_words_judge():
    """Only the question's own tokens may pass τ, wherever it stands in the prompt; beams repeat it per sample."""
    model, batch = llava(), inputs()
    questions = ["the round thing ?", "of the big red round thing ?", "is the thing"]
    with ivtp.prune(model, "ivtp", keep=KEEP, tau=-1.0, instruction=questions) as run:
        model.generate(**batch, max_new_tokens=1, num_beams=2, do_sample=False)
    for i, words in enumerate(run.trace.words):
        asked = [word for word, relevance in words if relevance > float("-inf")]
        assert asked == questions[i // 2].split()
        assert [word for word, _ in words] == TEXTS[i // 2].split()


def test_hidden_reference_itself_hides():
    """The oracle of this suite must notice a wrong trace, or its tests could not fail."""
    model, batch = llava(), inputs(TEXTS[:1])
    with ivtp.prune(model, "rollout", keep=KEEP) as run:
        actual = model(**batch).logits[:, -1]
    cuts = run.trace.vision
    wrong = [type(c)(c.layer, c.after, (c.position + 1).clamp_max(PATCHES - 1), c.valid) for c in cuts]
    full, _ = llava_logits(model, **batch, vision=wrong, language=[])
    with pytest.raises(AssertionError, match="relative error"):
        close(actual, full[:, -1], 1e-3)
    assert hidden_from(cuts, 7, PATCHES, 1)[0].sum() == 0


@pytest.mark.parametrize("name", ["topk", "rollout", "fastv", "ivtp"])
def test_a_dinov2_in_place_of_clip(name):
    """Its hidden states come before the last norm, as CLIP's do; no text encoder belongs to it."""
    from conftest import make_dinov2, shake
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    like = llava().config
    config = LlavaConfig(
        vision_config=make_dinov2().config,
        text_config=like.text_config,
        image_token_index=like.image_token_id,
        image_seq_length=PATCHES,
    )
    model, batch = shake(LlavaForConditionalGeneration(config), 12), inputs()
    valid = batch["attention_mask"].bool()
    more = {"reference": "last"} if name == "ivtp" else {}
    with ivtp.prune(model, name, keep=PATCHES, **more):
        kept = model(**batch).logits
    assert torch.equal(kept[valid], model(**batch).logits[valid])
    with ivtp.prune(model, name, keep=KEEP, **more) as run:
        short = model(**batch, position_ids=positions(batch)).logits[:, -1]
    full, seen = llava_logits(
        model, batch["input_ids"], batch["pixel_values"], valid, run.trace.vision, run.trace.language
    )
    close(short, full[:, -1])
    assert seen.sum(1).tolist() == (valid.sum(1) - PATCHES + KEEP).tolist()
