"""Model families: how each one's frozen layers are opened between attention and FFN.

A family is one module with `shape(model_or_config) → Shape` and `prune(model, plan, …)`, a context manager.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import nn

from ivtp.backbones.replacing import Latest
from ivtp.registry import UserError, unknown

# By transformers' `model_type`, or package and class.
FAMILIES = {
    "llava": "ivtp.backbones.llava",
    "llava_next": "ivtp.backbones.llava_next",
    "llava_onevision": "ivtp.backbones.llava_onevision",
    "qwen2_5_vl": "ivtp.backbones.qwen_vl",
    "qwen3_vl": "ivtp.backbones.qwen_vl",
    "internvl": "ivtp.backbones.internvl",
    "clip": "ivtp.backbones.clip_vit",
    "siglip": "ivtp.backbones.siglip_vit",
    "clip_vision_model": "ivtp.backbones.clip_vit",
    "siglip_vision_model": "ivtp.backbones.siglip_vit",
    "dinov2": "ivtp.backbones.dinov2_vit",
    "timm.VisionTransformer": "ivtp.backbones.timm_vit",
    "timm.Eva": "ivtp.backbones.timm_vit",
    **dict.fromkeys(
        ("open_clip.VisionTransformer", "open_clip.TimmModel", "open_clip.CLIP", "open_clip.CustomTextCLIP"),
        "ivtp.backbones.open_clip_vit",
    ),
}


LANGUAGE = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl")
"""Those that answer in words."""


class ModelError(UserError):
    """A model that is not there, not readable or not supported."""


def unwrapped(model):
    """The model inside the wrappers of torch.compile and PEFT."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", ()):
            model = model._orig_mod
        elif isinstance(model, nn.Module) and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def family(model) -> ModuleType:
    """The module of a model's (or config's) family; raises ModelError for one that is not supported."""
    if isinstance(getattr(model, "module", None), nn.Module):
        raise ModelError(f"{type(model).__name__} wraps the model; prune what is inside: ivtp.prune(model.module, ...)")
    config = getattr(model, "config", model)
    names = [
        getattr(config, "model_type", ""),
        *(f"{c.__module__.split('.')[0]}.{c.__name__}" for c in type(model).__mro__),
    ]
    for name in names:
        if name in FAMILIES:
            return import_module(FAMILIES[name])
    raise ModelError(unknown("model family", str(names[0] or names[1]), FAMILIES))


class VisionRun:
    """Cuts of the last image batch through a vision tower, and the tokens that left it."""

    vision = Latest()
    tokens = Latest()

    @property
    def trace(self) -> VisionRun:
        return self
