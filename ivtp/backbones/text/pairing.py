"""Attachments of a loaded model: its processor, the CLIP text encoder paired with its tower, its crop limit."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ivtp.backbones.family import ModelError
from ivtp.backbones.hooks.packed_linear import pack
from ivtp.backbones.loading.hub import Checkpoint
from ivtp.backbones.loading.image_inputs import CropLimit
from ivtp.backbones.text.encoders import TextEncoder
from ivtp.backbones.text.loading import TextSource, load_text_encoder, text_source
from ivtp.backbones.text.token_relevance import Guide
from ivtp.core.flops import Layers

# CLIP ViT-L/14 at 336 pixels is LLaVA-1.5's tower, known by (layers, width, image side); and its text half's sizes.
KNOWN_CLIPS = {(24, 1024, 336): "open_clip:ViT-L-14-336-quickgelu@openai"}
CLIP_L_TEXT = {"text": Layers(12, 768, 3072, 12, 12, 64, 2), "text_context": 77, "joint": 768}


METHODS = [name for name in vars(TextEncoder) if not name.startswith("_") and name != "embed"]
MEMBERS = [*METHODS, *TextEncoder.__annotations__]
"""Members that every text encoder must have; `embed` is for methods that compare patches with the whole instruction."""


@dataclass
class Attachments:
    """Belongings of one model that are no part of it.

    text_encoder  a source until a plan needs it, then the loaded encoder
    pack          pack its weights when it is loaded
    crop_limit    the most crops of an image, if that was limited
    """

    processor: Any
    text_encoder: str | TextEncoder | None
    pack: bool = False
    crop_limit: CropLimit | None = None

    @cached_property
    def source(self) -> TextSource | None:
        """Source of the text encoder, looked up once; None for an encoder that was given as an object."""
        return text_source(self.text_encoder) if isinstance(self.text_encoder, str) else None


_attached: weakref.WeakKeyDictionary[nn.Module, Attachments] = weakref.WeakKeyDictionary()


def as_text_encoder(given: str | Path | TextEncoder | None) -> str | TextEncoder | None:
    """A text encoder as `load_model` accepts it: a source, or an object. Raises ModelError for one of another kind."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, Path):
        return str(given)
    lacking = [name for name in MEMBERS if not hasattr(given, name)]
    if lacking:
        raise ModelError(
            f"text_encoder={type(given).__name__} object lacks {', '.join(lacking)} of ivtp.backbones.text.encoders.TextEncoder; "
            "give a folder, a hub id, open_clip:NAME@TAG, or such an object"
        )
    return given


def attach(
    model: nn.Module,
    processor: Any,
    text_encoder: str | TextEncoder | None,
    pack: bool = False,
    crop_limit: CropLimit | None = None,
) -> None:
    """Attach processor, text encoder and settings to `model` for as long as it lives."""
    clip = text_encoder or _known_clip(getattr(model, "config", None))
    _attached[model] = Attachments(processor, clip, pack, crop_limit)


def crop_limit_of(model: nn.Module) -> CropLimit | None:
    """The limit of `load_model(max_crops=…)`, if there is one."""
    attached = _attached.get(model)
    return attached.crop_limit if attached else None


def _known_clip(config: Any) -> str | None:
    vision: Any = getattr(config, "vision_config", None)
    if getattr(vision, "model_type", "") != "clip_vision_model":
        return None
    return KNOWN_CLIPS.get((vision.num_hidden_layers, vision.hidden_size, vision.image_size))


def guide_for(model: Any, reads_clip: bool = True) -> Guide:
    """Guide of a model; loads its text encoder on first use, if CLIP is read. Raises ModelError if one is missing."""
    attached = _attached.get(model)
    if attached is None or attached.processor is None:
        raise ModelError(
            "the pseudo CLS needs the model's processor and CLIP text encoder: load the model with ivtp.load_model, or "
            "register it with ivtp.load_model(model, processor, text_encoder=...)"
        )
    tokenizer, image_token_id = attached.processor.tokenizer, model.config.image_token_id
    if not reads_clip:
        return Guide(tokenizer, None, image_token_id)
    if attached.text_encoder is None:
        raise ModelError(
            "no CLIP text encoder is known for this vision tower; name the CLIP it comes from with "
            "ivtp.load_model(..., text_encoder='folder, hub id or open_clip:NAME@TAG'), or do without: ivtp with "
            "reference='last' or words='all'"
        )
    encoder: Any = attached.text_encoder
    if attached.source is not None and isinstance(encoder, str):
        encoder = attached.text_encoder = load_text_encoder(attached.source, model.device)
        if attached.pack:
            pack(encoder.model)
    width = model.config.vision_config.hidden_size
    if getattr(encoder, "vision_width", width) != width:
        raise ModelError(
            f"the text encoder {attached.source.checkpoint.source if attached.source else 'given'} belongs to a vision "
            f"tower of width {encoder.vision_width}, but this model's has {width}; name the CLIP that this tower comes from "
            "(model.text_encoder, load_model(text_encoder=…))"
        )
    return Guide(tokenizer, encoder, image_token_id)


def text_sizes(model: Any, source: str | None = None) -> dict:
    """Sizes, for `Shape`, of the text encoder of a model (or of a config, by `source` or its tower)."""
    attached = _attached.get(model) if isinstance(model, nn.Module) else None
    encoder: Any = attached.text_encoder if attached else source
    known = _known_clip(getattr(model, "config", model))
    if known and encoder in (None, known):
        return CLIP_L_TEXT  # without asking the hub
    if isinstance(encoder, str):
        named = attached.source if attached else text_source(encoder)
        return named.sizes() if named else {}
    return {} if encoder is None else {"text": encoder.sizes, "text_context": encoder.context, "joint": encoder.joint}


def text_checkpoint(model: nn.Module) -> Checkpoint | None:
    """Checkpoint of a model's text encoder, which is loaded now, so that an error in it shows before the first sample. None
    for an encoder that was given as an object, and where there is none."""
    attached = _attached.get(model)
    if attached is None or attached.source is None:
        return None
    guide_for(model)
    return attached.source.checkpoint
