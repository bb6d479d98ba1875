"""What belongs to a loaded model without being part of it: its processor and the CLIP text encoder paired with its tower."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ivtp.backbones import ModelError
from ivtp.backbones.guidance import Guide, TextEncoder
from ivtp.backbones.hub import Checkpoint
from ivtp.backbones.image_inputs import CropLimit
from ivtp.backbones.packed import pack
from ivtp.backbones.text_encoders import TextSource, load_text_encoder, text_source
from ivtp.pruning.cost import Layers

# CLIP ViT-L/14 at 336 pixels is LLaVA-1.5's tower, known by (layers, width, image side); and its text half's sizes.
KNOWN_CLIPS = {(24, 1024, 336): "open_clip:ViT-L-14-336-quickgelu@openai"}
CLIP_L_TEXT = {"text": Layers(12, 768, 3072, 12, 12, 64, 2), "text_context": 77, "joint": 768}


@dataclass
class Companion:
    """`text_encoder` is a source until a plan asks for it, then the loaded encoder; `pack`: its weights, once loaded;
    `crop_limit`: the most crops of an image, if that was limited."""

    processor: object
    text_encoder: str | TextEncoder | None
    pack: bool = False
    crop_limit: CropLimit | None = None
    _found: TextSource | None = None

    @property
    def source(self) -> TextSource | None:
        """Source of the text encoder, looked up once; None for one that is not known by a source."""
        if self._found is None and isinstance(self.text_encoder, str):
            self._found = text_source(self.text_encoder)
        return self._found


_companions: weakref.WeakKeyDictionary[nn.Module, Companion] = weakref.WeakKeyDictionary()


def as_text_encoder(given: str | Path | TextEncoder | None) -> str | TextEncoder | None:
    """A text encoder as `load_model` accepts it: a source, or an object. Raises ModelError for one of another kind."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, Path):
        return str(given)
    lacking = [
        name for name in ("encode", "lengths", "project", "sizes", "context", "joint") if not hasattr(given, name)
    ]
    if lacking:
        raise ModelError(
            f"text_encoder={type(given).__name__} object lacks {', '.join(lacking)} of ivtp.backbones.guidance.TextEncoder; "
            "give a folder, a hub id, open_clip:NAME@TAG, or such an object"
        )
    return given


def accompany(
    model: nn.Module,
    processor,
    text_encoder: str | TextEncoder | None,
    pack: bool = False,
    crop_limit: CropLimit | None = None,
) -> None:
    """Remember what belongs to `model` for as long as it lives."""
    config = getattr(model, "config", None)
    _companions[model] = Companion(processor, text_encoder or _known_clip(config), pack, crop_limit)


def crop_limit_of(model: nn.Module) -> CropLimit | None:
    """The limit of `load_model(max_crops=…)`, if there is one."""
    companion = _companions.get(model)
    return companion.crop_limit if companion else None


def _known_clip(config) -> str | None:
    vision = getattr(config, "vision_config", None)
    if getattr(vision, "model_type", "") != "clip_vision_model":
        return None
    return KNOWN_CLIPS.get((vision.num_hidden_layers, vision.hidden_size, vision.image_size))


def guide_for(model: nn.Module, reads_clip: bool = True) -> Guide:
    """The guide of a model; loads its text encoder on first use, if it is read. Raises ModelError if one is missing."""
    companion = _companions.get(model)
    if companion is None or companion.processor is None:
        raise ModelError(
            "the pseudo CLS needs the model's processor and CLIP text encoder: load the model with ivtp.load_model, or "
            "register it with ivtp.load_model(model, processor, text_encoder=...)"
        )
    if not reads_clip:
        return Guide(companion.processor.tokenizer, None, model.config.image_token_id)
    if companion.text_encoder is None:
        raise ModelError(
            "no CLIP text encoder is known for this vision tower; name the CLIP it comes from with "
            "ivtp.load_model(..., text_encoder='folder, hub id or open_clip:NAME@TAG'), or do without: ivtp with "
            "reference='last' or words='all'"
        )
    if isinstance(companion.text_encoder, str):
        companion.text_encoder = load_text_encoder(companion.source, model.device)
        if companion.pack:
            pack(companion.text_encoder.model)
    encoder, width = companion.text_encoder, model.config.vision_config.hidden_size
    if getattr(encoder, "vision_width", width) != width:
        raise ModelError(
            f"the text encoder {companion.source.checkpoint.source if companion.source else 'given'} belongs to a vision "
            f"tower of width {encoder.vision_width}, but this model's has {width}; name the CLIP that this tower comes from "
            "(model.text_encoder, load_model(text_encoder=…))"
        )
    return Guide(companion.processor.tokenizer, companion.text_encoder, model.config.image_token_id)


def text_sizes(model, source: str | None = None) -> dict:
    """Sizes of the text encoder that belongs to a model (or, by `source` or its tower, to a config), for `Shape`."""
    companion = _companions.get(model) if isinstance(model, nn.Module) else None
    encoder = companion.text_encoder if companion else source
    known = _known_clip(getattr(model, "config", model))
    if known and encoder in (None, known):
        return CLIP_L_TEXT  # without asking the hub
    if isinstance(encoder, str):
        return (companion.source if companion else text_source(encoder)).sizes()
    return {} if encoder is None else {"text": encoder.sizes, "text_context": encoder.context, "joint": encoder.joint}


def text_checkpoint(model: nn.Module) -> Checkpoint | None:
    """The checkpoint of a model's text encoder, which is loaded if it is not yet, so that what is wrong with it is said
    before the first sample. None where it was given as an object, or there is none."""
    companion = _companions.get(model)
    if companion is None or companion.source is None:
        return None
    guide_for(model)
    return companion.source.checkpoint
