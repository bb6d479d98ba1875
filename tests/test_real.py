"""Real weights: the oracles where attention sinks, outlier channels and grouped-query attention are real.

SmolLM2-135M (a Llama of 30 layers, 9 query heads over 3 key-value heads) behind DINOv2 ViT-S/14 (class token, layer scale)
as one LLaVA, whose projector alone is random. `python -m experiments.real.fetch` writes both below outputs/real, or below
the folder that IVTP_REAL names for these tests; `pytest -m real` runs them.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close, make_text_encoder, settings_of, shake, skip_unless_it_drops
from core.test_cost import agree, counted
from helpers.reference import dense_importance, dense_rollout, dense_value_norm, dinov2_states, heads_of, llava_logits
from pruners.test_every_pruner import generate, remaining

import ivtp
from ivtp.core.attention import Attention
from ivtp.core.flops import cost
from ivtp.core.plan import Plan
from ivtp.core.reduces import Fuse, Merge
from ivtp.core.scores import Layerwise, Rollout
from ivtp.core.tokens import Tokens
from ivtp.pruners import PRUNERS

FOLDER = Path(os.environ.get("IVTP_REAL") or Path(__file__).parent.parent / "outputs" / "real")
LLAMA, VIT = FOLDER / "smollm2", FOLDER / "dinov2-small"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (LLAMA.is_dir() and VIT.is_dir()),
        reason=f"no real weights in {FOLDER}: python -m experiments.real.fetch",
    ),
]

SIDE, PATCHES, KEEP = 140, 100, 12
IMAGE = 4
"""Id of `<reponame>`, a mark of the tokenizer that no prompt here has, in place of LLaVA's `<image>`."""
QUESTIONS = (
    "What is the capital city of the country whose flag is shown here, and how many people live there?",
    "Is there a flower?",
)
NAMES = ivtp.list_pruners()

# Float32 sums of other lengths and orders differ by 1e-7 of the largest term. The residual stream has one channel of
# 2e4 beside a median of 3, so that other channels lose up to four digits of seven before the next norm divides them out;
# 30 layers add up. Measured over all methods: at most 1.8e-5 of the largest logit. One token of the
# prompt that is wrongly hidden changes them by 5e-2 (measured with the mark that also pads).
TOLERANCE = 5e-5


@cache
def tower():
    """The ViT for images of 140 pixels: 10 × 10 patches."""
    from transformers import Dinov2Model

    from ivtp.backbones.vision.transformers import resize

    model = Dinov2Model.from_pretrained(VIT).eval().requires_grad_(False)
    resize(model, SIDE)
    return model


@cache
def llama():
    from transformers import AutoTokenizer, LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(LLAMA).eval().requires_grad_(False), AutoTokenizer.from_pretrained(LLAMA)


@cache
def llava():
    """Both as one LLaVA. CLIP's half of texts has random weights too: which words pass is chance, what follows is not."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language, tokenizer = llama()
    config = LlavaConfig(
        vision_config=tower().config,
        text_config=language.config,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower(), language.model, language.lm_head
    model.model.multi_modal_projector = shake(model.model.multi_modal_projector.to_empty(device="cpu"), 4)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = None  # nothing ends early
    encoder = make_text_encoder(context=77, vision_width=384)
    return ivtp.load_model(model, SimpleNamespace(tokenizer=tokenizer), encoder)[0]


def pixels(count: int = 2):
    """Photographs, as the ViT was trained on."""
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(VIT)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    photos = [Image.fromarray(photo) for photo in load_sample_images().images[:count]]
    return processor(images=photos, return_tensors="pt", **size)["pixel_values"]


@cache
def inputs():
    """Both questions in the model's chat format, padded on the left; the image stands before the question."""
    tokenizer = llama()[1]
    rows = []
    for question in QUESTIONS:
        head = tokenizer("<|im_start|>user\n")["input_ids"]
        tail = tokenizer(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        rows.append([*head, *[IMAGE] * PATCHES, *tail])
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": pixels(),
    }


def alone(sample: int) -> dict:
    """One of the prompts without its padding. Its mask says that `<|im_end|>`, which pads too, is a token of the prompt."""
    batch = {name: value[sample : sample + 1] for name, value in inputs().items()}
    real = batch["attention_mask"].bool()[0]
    return batch | {name: batch[name][:, real] for name in ("input_ids", "attention_mask")}


def plan_of(name: str, keep: int = KEEP, **settings) -> Plan:
    return ivtp.load_pruner(name, ivtp.shape_of(llava()), **settings_of(name, keep=keep, **settings))


# The weights are what they are said to be


def test_the_vit_computes_what_its_onnx_graph_does():
    """The converted ViT at its own 224 pixels, against onnxruntime on the graph that it was taken from."""
    onnx = pytest.importorskip("onnx", reason="pip install -r experiments/real/requirements.txt")
    runtime = pytest.importorskip("onnxruntime", reason="pip install -r experiments/real/requirements.txt")
    from transformers import AutoImageProcessor

    from ivtp.backbones.loading.encoders import load_encoder

    graph, states = onnx.load(str(FOLDER / "sources" / "dinov2-small.onnx")), "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(states))
    session = runtime.InferenceSession(graph.SerializeToString())
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    images = AutoImageProcessor.from_pretrained(VIT)(images=photos, return_tensors="pt")["pixel_values"]
    (expected,) = session.run([states], {"input_image": images.numpy()})
    encoder = load_encoder("transformers", str(VIT))
    close(encoder.model(images).last_hidden_state, torch.from_numpy(expected), 2e-5)
    close(encoder.features(images), torch.from_numpy(expected[:, 0]), 2e-5)


def test_the_llama_speaks_english():
    """Weights, rotary order of q and k, tokenizer: each of them wrong makes noise of it."""
    model, tokenizer = llama()
    for start, end in (
        ("The capital of France is", " Paris"),
        ("One, two, three, four,", " five, six"),
        ("The opposite of hot is", " cold"),
        ("Water freezes at zero degrees", " Celsius"),
        ("The sun rises in the east and sets in the", " west"),
    ):
        ids = tokenizer(start, return_tensors="pt")
        text = tokenizer.decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[0])
        assert text.startswith(start + end), text
    text = (
        "The old man walked slowly down the road to the village. He had not eaten since the morning, and the sun was "
        "already low over the hills. When he reached the first house, a woman opened the door and asked him where he "
        "came from."
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]

    def perplexity(ids):
        likely = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return float((-likely.mean()).exp())

    assert perplexity(ids) < 30 < 500 < perplexity(shuffled)


def test_the_llamas_weights_are_those_of_its_file():
    """Matrices against gguf's own dequantisation; rows of q and k stand in llama.cpp's order of rotary pairs there."""
    gguf = pytest.importorskip("gguf", reason="pip install -r experiments/real/requirements.txt")
    tensors = {t.name: t for t in gguf.GGUFReader(FOLDER / "sources" / "smollm2.gguf").tensors}
    layer = llama()[0].model.layers[17]
    for name, weight, heads in (
        ("attn_q", layer.self_attn.q_proj.weight, 9),
        ("attn_k", layer.self_attn.k_proj.weight, 3),
        ("attn_v", layer.self_attn.v_proj.weight, 0),
        ("ffn_down", layer.mlp.down_proj.weight, 0),
    ):
        found = tensors[f"blk.17.{name}.weight"]
        expected = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
        if heads:
            expected = expected.view(heads, 32, 2, 576).transpose(1, 2).reshape(weight.shape)
        assert torch.equal(weight, expected), name


def test_sinks_and_outlier_channels_are_there():
    """What random weights lack, and what these tests are for."""
    model, batch = llava(), alone(0)
    states = model(**batch, output_hidden_states=True).hidden_states
    deep = states[20][0].abs()
    assert deep.max() > 1000 * deep.median() and int(deep.amax(1).argmax()) == 0, (
        "no massive activation at the first token"
    )
    assert deep.amax(0).topk(2).values.diff().abs() > 0.9 * deep.max(), "it is not one channel's"
    with eager(model.model.language_model) as decoder:
        x = model.model.language_model.embed_tokens(batch["input_ids"].clamp_min(IMAGE + 1))
        maps = decoder(inputs_embeds=x, output_attentions=True).attentions
    assert torch.stack(maps)[5:25, 0, :, 50:, 0].mean() > 0.3, "the first token is no attention sink"


# The oracles of tests/pruners/test_every_pruner.py


@cache
def untouched():
    """Logits and generated tokens of the model itself."""
    return llava()(**inputs()).logits, generate(llava(), inputs())


@pytest.mark.parametrize("name", NAMES)
def test_keeping_every_token_is_the_model_itself(name):
    """Bit for bit, the pseudo CLS appended and gone again."""
    valid = inputs()["attention_mask"].bool()
    with ivtp.prune(llava(), plan_of(name, PATCHES)):
        assert torch.equal(llava()(**inputs()).logits[valid], untouched()[0][valid])
        for actual, expected in zip(generate(llava(), inputs()), untouched()[1], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", NAMES)
def test_dropping_tokens_is_hiding_them_and_decoding_with_the_cache_is_recomputing(name, positions):
    """Every surviving token's logits and those of decoded tokens, from the unmodified modules on the full sequence."""
    if name == "ivtp_v":
        pytest.skip("ivtp_v has the plan of rollout (see test_zoo.py), which is tested")
    if name == "none":
        pytest.skip("none removes nothing; keep-everything covers it")
    model, batch = llava(), inputs()
    plan = plan_of(name, position_ids=positions)
    skip_unless_it_drops(name, plan)
    with ivtp.prune(model, plan) as run:
        short = model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp_min(0)).logits
        sequences, decoded = generate(model, batch)
        trace = run.trace
    mask = torch.cat([batch["attention_mask"], torch.ones(2, decoded.shape[1], dtype=torch.long)], 1)
    cuts = trace.vision, trace.language
    full, seen = llava_logits(model, sequences, batch["pixel_values"], mask, *cuts, renumber=positions == "renumber")
    n = batch["input_ids"].shape[1]
    close(decoded, full[:, n - 1 : -1], TOLERANCE)
    for i in range(2):
        left = remaining(batch["input_ids"][i], batch["attention_mask"][i], trace.kept, i, IMAGE)
        close(short[i][left], full[i, :n][seen[i, :n]], TOLERANCE)
    assert trace.kept.position.shape[1] <= max(KEEP, plan.final)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_a_padded_batch_is_that_prompt_alone_at_the_cost_that_was_foretold(name):
    """Kept tokens and logits; FLOPs of every part as the counter counts them."""
    model, plan = llava(), plan_of(name)
    with ivtp.prune(model, plan) as run:
        together = generate(model, inputs(), max_new_tokens=1)[1]
        batched = [*run.trace.vision, *run.trace.language]
        close(generate(model, alone(1), max_new_tokens=1)[1][0], together[1], TOLERANCE)
        for own, cut in zip([*run.trace.vision, *run.trace.language], batched, strict=True):
            assert torch.equal(own.position[0][own.valid[0]], cut.position[1][cut.valid[1]])
    from ivtp.backbones.text.pairing import guide_for

    shape, encoder = ivtp.shape_of(model), guide_for(model).encoder
    text = alone(1)["input_ids"].shape[1] - PATCHES
    said = llama()[1].decode(alone(1)["input_ids"][0], skip_special_tokens=True)
    read = len(encoder.tokenizer(said, add_special_tokens=False)["input_ids"]) + 2
    agree(counted(model, plan, lambda: model(**alone(1)), "language"), cost(shape, plan, text, read, streamed=True))


# Scores and merging


class eager:
    """Within the context a model of transformers computes attention eagerly, so that it can give its maps."""

    def __init__(self, model) -> None:
        self.model = model

    def __enter__(self):
        self.model.set_attn_implementation("eager")
        return self.model

    def __exit__(self, *error) -> None:
        self.model.set_attn_implementation("sdpa")


def of_vision():
    """Stack, tokens, states before each layer, the model's own maps, and how a layer makes values, of the ViT."""
    from helpers.reference import dinov2_linears

    from ivtp.backbones.vision.transformers import Dinov2Vit

    with eager(tower()) as model:
        out = model(pixels(), output_hidden_states=True, output_attentions=True)
    layers = model.encoder.layer
    stack = Dinov2Vit(model)
    values = [lambda x, layer=layer: heads_of(dinov2_linears(layer)[2](layer.norm1(x)), 6) for layer in layers]
    return stack, stack.embed(pixels()), out.hidden_states, out.attentions, values


def of_language():
    """The same of the Llama, with the last word as the reference token."""
    from ivtp.backbones.language.llama import Llama

    model, batch, caught = llava(), alone(0), []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**batch)
    hook.remove()
    with eager(decoder):
        out = decoder(inputs_embeds=caught[0], output_hidden_states=True, output_attentions=True)
    n = batch["input_ids"].shape[1]
    last = torch.arange(n)[None] == n - 1
    tokens = Tokens.of(caught[0], visual=batch["input_ids"] == IMAGE, reference=last)
    values = [
        lambda x, layer=layer: heads_of(layer.self_attn.v_proj(layer.input_layernorm(x)), 3) for layer in decoder.layers
    ]
    return Llama(decoder), tokens, out.hidden_states, out.attentions, values


@pytest.mark.parametrize("site", [of_vision, of_language], ids=["vision", "language"])
def test_scores_are_those_of_the_models_own_attention(site):
    """Eq. 2–4 on the maps that transformers returns, float64: rollout and layer-wise scores of every group of three."""
    stack, tokens, states, maps, values = site()
    index, reference = tokens.visual_index, int(tokens.reference[0].nonzero()[0])
    records: list[Attention] = []
    for layer in range(stack.depth):
        record = stack.peek(layer, tokens.with_x(states[layer]))
        close(record.map(), maps[layer].mean(1), 1e-5)
        records.append(record)
        if layer % 3 < 2:
            continue
        v = values[layer](states[layer])
        norm = dense_value_norm(v, maps[layer].shape[1])
        group = [m.double().mean(1) for m in maps[layer - 2 : layer + 1]]
        for score, row in ((Rollout(), dense_rollout(group)[:, reference]), (Layerwise(True), group[-1][:, reference])):
            close(score(records[-3:], tokens), dense_importance(row, norm, index), 1e-5)


def spied(plan: Plan, calls: list) -> Plan:
    """The plan, whose reduce in the tower notes what it was given and what it made."""
    own = plan.vision.reduce

    def reduce(x, size, scores, selection):
        made = own(x, size, scores, selection)
        calls.append((x, size, scores, selection, made))
        return made

    return replace(plan, vision=replace(plan.vision, reduce=reduce))


def test_merged_tokens_are_attended_to_as_if_all_were_there():
    """ToMe: the unmodified ViT on all tokens, in which the members of a cluster take on its mean. With the logarithm of its
    size on its logits, one token must weigh as much as all of them."""
    plan, calls = ivtp.load_pruner("tome", ivtp.shape_of(tower()), keep=KEEP), []
    with ivtp.prune(tower(), spied(plan, calls)):
        pooled = tower()(pixels()).pooler_output
    assert len(calls) == 12 and calls[0][4][0].shape[1] > calls[-1][4][0].shape[1] == KEEP
    x = tower().embeddings(pixels())
    owner = torch.arange(PATCHES).expand(2, -1)
    for layer, (_, _, _, selection, (merged, _)) in zip(tower().encoder.layer, calls, strict=True):
        attended = x + attention_of(layer, x)
        owner = selection.into.gather(1, owner)
        members = torch.nn.functional.one_hot(owner, selection.index.shape[1]).to(x.dtype)
        mean = members.transpose(1, 2) @ attended[:, 1:] / members.sum(1)[:, :, None]
        close(merged, mean, TOLERANCE)
        x = torch.cat([attended[:, :1], members @ mean], 1)
        x = x + layer.layer_scale2(layer.mlp(layer.norm2(x)))
    close(pooled, tower().layernorm(x)[:, 0], TOLERANCE)


def attention_of(layer, x):
    """What the unmodified attention of a layer adds to the residual stream."""
    output = layer.attention(layer.norm1(x))
    return layer.layer_scale1(output[0] if isinstance(output, tuple) else output)


def test_what_evit_fuses_is_the_weighed_sum_of_what_goes():
    plan, calls = ivtp.load_pruner("evit", ivtp.shape_of(tower()), keep=KEEP), []
    assert (
        plan.vision.reduce == Fuse()
        and ivtp.load_pruner("tome", ivtp.shape_of(tower()), keep=KEEP).vision.reduce == Merge()
    )
    with ivtp.prune(tower(), spied(plan, calls)):
        tower()(pixels())
    for x, _, scores, _, (made, _) in calls:
        stays = scores.argsort(dim=1, descending=True, stable=True)[:, : made.shape[1] - 1]
        rest = scores.double().scatter(1, stays, 0.0)
        close(made[:, -1], (x.double() * rest[:, :, None]).sum(1))
        close(made[:, :-1], x.gather(1, stays[:, :, None].expand(-1, -1, x.shape[2])))


@pytest.mark.parametrize("name", [name for name in NAMES if "keep" in inspect.signature(PRUNERS[name]).parameters])
def test_removed_patches_are_hidden_from_the_unmodified_vit(name):
    """The tower alone, its class token read behind the last layer, as in experiment=vision_emoji."""
    try:
        plan = ivtp.load_pruner(name, ivtp.shape_of(tower()), **settings_of(name, keep=16))
    except ValueError as error:
        if "language" not in str(error):
            raise
        pytest.skip(f"{name} prunes inside a language model, and a vision tower has none")
    skip_unless_it_drops(name, plan)
    with ivtp.prune(tower(), plan) as run:
        actual = tower()(pixels()).pooler_output
    close(actual, tower().layernorm(dinov2_states(tower(), pixels(), run.vision)[-1][:, 0]), TOLERANCE)
