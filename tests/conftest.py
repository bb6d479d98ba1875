"""Tiny random models for all tests. Their weights are large, so that logits differ by more than rounding hides."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import helpers.checks  # noqa: F401 (the import hook looks for it among what is loaded)
from jaxtyping import install_import_hook

# Shapes and types of the core are checked in tests only: users pay nothing for it.
if not os.environ.get("JAXTYPING_DISABLE"):
    core = Path(__file__).parents[1] / "ivtp" / "core"
    # Triton reads the source of its kernels, in which no decorator of the hook may stand.
    checked = [f"ivtp.core.{path.stem}" for path in sorted(core.glob("*.py")) if path.stem != "triton_sums"]
    install_import_hook(checked, "helpers.checks.checked")

import inspect
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers.place import DEVICE, DTYPE, ROUNDING, placed
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "ivtp", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ivtp")

SIDE, PATCH = 35, 7
PATCHES = (SIDE // PATCH) ** 2  # 25
KEEP = 5
PAD, BOS, EOS, UNK, IMAGE = range(5)
WORDS = [
    "what",
    "color",
    "is",
    "the",
    "big",
    "red",
    "round",
    "thing",
    "left",
    "of",
    "a",
    "small",
    "cube",
    "?",
    "how",
    "many",
    "are",
    "there",
]
TEXTS = (
    "what color is the round thing ?",
    "how many cube are there left of the big red round thing ?",
    "is the thing small ?",
)


@pytest.fixture(scope="session", autouse=True)
def _facts_are_true():
    """In every test, of all tokens ever made: a fact that a cut forgot to change would hide padding from nobody, or
    find the visual tokens at the wrong places."""
    from ivtp.core.tokens import Facts, Tokens

    find = Tokens.__post_init__

    def checked(tokens) -> None:
        find(tokens)
        if torch.compiler.is_compiling():
            return
        told, found = tokens.facts, Facts.of(tokens.valid, tokens.visual, tokens.reference)
        # What is certain need not be known: padding may be expected where there is none by chance.
        assert told.padded or not found.padded
        assert not told.lone or bool((tokens.reference.sum(1) <= 1).all())  # one that is visual itself may be cut
        assert told.visual == found.visual
        assert told.start in (None, found.start)
        assert told.lead <= found.lead  # more, where what stood first was cut among tokens that stay

    Tokens.__post_init__ = checked
    yield
    Tokens.__post_init__ = find


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal():
    """Tests that send SIGHUP or SIGINT are right where these end a process, also those that `nohup` or `&` has started."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, hangup)
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def shake(model, seed: int = 0, gain: float = 1.6):
    """Random weights with a raised scale, biases and norms included: nothing is zero, one, or nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                weight.copy_((1.0 if name.endswith("weight") and "norm" in name else 0.0) + 0.3 * noise)
            elif "embed" in name and "patch" not in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * gain / weight[0].numel() ** 0.5)
    return placed(model.eval().requires_grad_(False))


def images(batch: int, seed: int = 3):
    return placed(torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)))


def make_timm(kind: str):
    from timm.layers import SwiGLUPacked
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    sizes = {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": 24,
        "depth": 7,
        "num_heads": 3,
        "mlp_ratio": 1.5,
        "num_classes": 11,
    }
    plain = {
        "timm_cls": {},
        "timm_avg": {"class_token": False, "global_pool": "avg"},
        "timm_registers": {"reg_tokens": 2, "qk_norm": True, "init_values": 0.7, "pre_norm": True},
        "timm_map": {"class_token": False, "global_pool": "map", "mlp_layer": SwiGLUPacked},
    }
    # EVA-02, attention pooling over frequencies mixed per layer, DINOv3: each with another kind of rotary positions.
    rotary = {"use_rot_pos_emb": True}
    learned = {**rotary, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "ref_feat_shape": (4, 4)}
    mixed = {**rotary, "swiglu_mlp": True, "rope_type": "mixed", "class_token": False, "global_pool": "map"}
    dino = {**rotary, "rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 2, "attn_type": "rope"}
    eva = {
        "timm_eva02": {**learned, "init_values": 0.7},
        "timm_eva_mixed": {**mixed, "use_abs_pos_emb": False},
        "timm_eva_dinov3": {**dino, "use_abs_pos_emb": False, "global_pool": "token"},
    }
    if kind in eva:
        return shake(Eva(**sizes, **eva[kind]), 1)
    return shake(VisionTransformer(**sizes, **plain[kind]), 1)


def vision_config(**changes):
    from transformers import CLIPVisionConfig

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 7,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": 13,
    }
    return CLIPVisionConfig(**{**sizes, **changes})


def text_config(tokenizer, context: int = 19):
    """CLIP's text half in the joint space of 13 dimensions."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=20,
        intermediate_size=31,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=context,
        projection_dim=13,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def make_clip(kernel: str = "sdpa"):
    from transformers import CLIPVisionModel

    return shake(CLIPVisionModel._from_config(vision_config(), attn_implementation=kernel), 2)


def siglip_config(**changes):
    from transformers import SiglipVisionConfig

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 7,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return SiglipVisionConfig(**{**sizes, **changes})


def make_siglip(kernel: str = "sdpa"):
    from transformers import SiglipVisionModel

    return shake(SiglipVisionModel._from_config(siglip_config(), attn_implementation=kernel), 8)


def make_dinov2(kernel: str = "sdpa"):
    """With a gated FFN where the kernel is eager, so that both are tested."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 7,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = Dinov2Config(**sizes, use_swiglu_ffn=kernel == "eager", mlp_ratio=2, use_mask_token=False)
    return shake(Dinov2Model._from_config(config, attn_implementation=kernel), 10)


def make_open_clip(kind: str):
    """With four heads torch runs attention as one kernel, with three it does not."""
    from open_clip.transformer import VisionTransformer

    sizes = {"image_size": SIDE, "patch_size": PATCH, "width": 24, "layers": 7, "mlp_ratio": 1.5, "output_dim": 13}
    more = {
        "tok": {"heads": 4},
        "avg": {"heads": 3, "ls_init_value": 0.7, "pool_type": "avg", "final_ln_after_pool": True},
        "mean": {"heads": 4, "pool_type": "avg"},
    }
    return shake(VisionTransformer(**sizes, **more[kind]), 9)


def make_llava(kernel: str = "sdpa", seed: int = 4, vision: dict | None = None, text: dict | None = None, **changes):
    """LLaVA with 7 ViT layers, 9 LLM layers (3 of them part 1), 6 query heads over 2 key-value heads."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    language = {
        "hidden_size": 42,
        "intermediate_size": 53,
        "num_hidden_layers": 9,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": len(WORDS) + 5,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    config = LlavaConfig(
        vision_config=vision_config(**(vision or {})),
        text_config=LlamaConfig(**{**language, **(text or {})}),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        **changes,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=kernel)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # nothing ends early
    return shake(model, seed)


def word_tokenizer():
    """One token per word: the LLM's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def byte_tokenizer(corpus=(*TEXTS, *TEXTS), size: int = 320, **settings):
    """Byte-level BPE: pieces of words, emoji in several tokens: CLIP's, or another LLM's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<start>", "<end>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", **settings)


def make_text_encoder(context: int = 19, vision_width: int = 24):
    from transformers import CLIPTextModelWithProjection

    from ivtp.backbones.text.encoders import TransformersText

    tokenizer = byte_tokenizer()
    model = shake(CLIPTextModelWithProjection(text_config(tokenizer, context)), 6)
    projection = placed(torch.randn(13, vision_width, generator=torch.Generator().manual_seed(6)))
    return TransformersText(model, tokenizer, projection)


def prompts(texts=TEXTS, padded_to: int | None = None):
    """input_ids and attention_mask, left-padded; the image stands after the first word of each prompt."""
    tokenizer = word_tokenizer()
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append([BOS, ids[0], *[IMAGE] * PATCHES, *ids[1:]])
    length = padded_to or max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return placed({"input_ids": ids, "attention_mask": mask})


def inputs(texts=TEXTS, **kwargs):
    """A padded batch: prompt number i always comes with image number i."""
    pixels = torch.stack([images(len(TEXTS))[TEXTS.index(text)] for text in texts])
    return {**prompts(texts, **kwargs), "pixel_values": pixels}


_made = {}


def llava(kernel: str = "sdpa"):
    """The one LLaVA of the session per kernel, with its tokenizer and text encoder."""
    from ivtp import load_model

    if kernel not in _made:
        model, _ = load_model(make_llava(kernel), SimpleNamespace(tokenizer=word_tokenizer()), make_text_encoder())
        _made[kernel] = model
    return _made[kernel]


def vision_model(kind: str):
    if kind not in _made:
        family, _, kernel = kind.partition("_")
        make = {"clip": make_clip, "siglip": make_siglip, "openclip": make_open_clip, "dinov2": make_dinov2}.get(family)
        _made[kind] = make(kernel) if make else make_timm(kind)
    return _made[kind]


VISION = [
    *("timm_cls", "timm_avg", "timm_registers", "timm_map", "timm_eva02", "timm_eva_mixed", "timm_eva_dinov3"),
    *("clip_sdpa", "clip_eager", "siglip_sdpa", "siglip_eager", "openclip_tok", "openclip_avg"),
    *("dinov2_sdpa", "dinov2_eager"),
]
"""Every vision backbone; LLaVA has tests of its own."""


AT_LEAST = {"vispruner": 17}
"""Methods that cannot keep as few as KEEP of 25 patches."""


def settings_of(name: str, keep: int = KEEP, **settings):
    """`keep` for the pruners that take it, and a threshold that random features do pass."""
    from ivtp.pruners import PRUNERS

    accepted = inspect.signature(PRUNERS[name]).parameters
    wanted = {"keep": max(keep, AT_LEAST.get(name, 0)), "tau": 0.1, **settings}
    return {key: value for key, value in wanted.items() if key in accepted or key == "position_ids"}


def plan_of(name: str, model, **settings):
    """The plan of a registered pruner on a backbone; skips, in words, where the method cannot run."""
    from ivtp import load_pruner, shape_of

    shape = shape_of(model)
    try:
        return load_pruner(name, shape, **settings_of(name, **settings))
    except ValueError as error:
        if shape.language is None and "language" in str(error):
            pytest.skip(f"{name} prunes inside a language model, and a vision tower has none")
        if not shape.has_cls and ("CLS" in str(error) or "class token" in str(error)):
            pytest.skip(f"{name} needs a class token, and this tower averages its patches")
        if "halve" in str(error):
            pytest.skip(f"{name} can at most halve the tokens in one step, and this schedule asks for more")
        raise


def skip_unless_it_drops(name: str, plan) -> None:
    """Skip a pruner that blends the tokens that it removes into those that it keeps: no mask is equivalent."""
    from ivtp.core.plan import Stage
    from ivtp.core.reduces import Drop

    for stage in (plan.vision, plan.language):
        if stage is not None and not (isinstance(stage, Stage) and stage.reduce == Drop()):
            pytest.skip(f"{name} blends what it removes into what it keeps; hiding by a mask is not the same")


FIRST = slice(None) if torch.float32 == DTYPE else slice(1)


def same_tokens(alone, batched, sample: int) -> bool:
    """True if a prompt by itself kept the tokens that it kept as row `sample` of a batch, as it must in float32.

    Narrower numbers round differently in another batch, and then nearly equal scores change places: most tokens stay.
    So do nearly equal logits: compare the logits of the first FIRST generated tokens.
    """
    __tracebackhide__ = True
    same = True
    for one, cut in zip(alone, batched, strict=True):
        own, found = one.of(0).tolist(), cut.of(sample).tolist()
        if torch.float32 == DTYPE:
            assert own == found, f"{own} alone, {found} in a batch"
        assert len(set(own) & set(found)) >= len(own) // 2
        same &= own == found
    return same


def untouched(actual, expected, plan) -> None:
    """Assert that keeping everything changes no bit.

    On a GPU up to rounding where a plan adds the sizes of tokens to the logits: a mask, of zeros too, has another kernel.
    """
    __tracebackhide__ = True
    sized = any(getattr(stage, "proportional", False) for stage in (plan.vision, plan.language))
    if DEVICE == "cpu" or not sized:
        assert torch.equal(actual, expected)
    elif actual.is_floating_point():
        close(actual, expected)


def close(actual, expected, tolerance: float = 1e-5):
    """Equal up to `tolerance` of the largest entry; on a GPU and in narrower numbers up to what they round more."""
    __tracebackhide__ = True
    tolerance *= ROUNDING
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "not finite"
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:g}"
