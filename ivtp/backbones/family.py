"""Model families: their registration, the family of a model, and the sizes that cost and pruning depend on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from ivtp.backbones.vlm.vision_cache import VisionCache
from ivtp.core.flops import Layers, Shape
from ivtp.registry import UserError, unknown

if TYPE_CHECKING:
    from ivtp.backbones.text.encoders import TextEncoder
    from ivtp.backbones.vlm.adapter import VLMAdapter


class ModelError(UserError):
    """A model that is not there, not readable or not supported."""


@dataclass(frozen=True)
class PruneOptions:
    """Options of a pruned run that are no part of the plan; `ivtp.prune` describes those that are not named here.

    A run hands these on from batch to batch:

    adapter       the VLM adapter of this model, with the layouts that it has made; None: a new one
    text_encoder  in place of the model's own, such as a `TextMemory` of it
    """

    instruction: str | Sequence[str] | None = None
    read_early: bool = False
    part: Callable[[str], AbstractContextManager] = nullcontext
    vision_cache: VisionCache | None = None
    target_patches: Tensor | None = None
    adapter: VLMAdapter | None = None
    text_encoder: TextEncoder | None = None


class Family:
    """Models of one architecture. A vision-language family gives an `adapter`; an encoder's family overrides `prune`."""

    adapter: type[VLMAdapter]
    """Class of the VLM adapter, which is made of a model."""

    def shape(self, model: Any, image: tuple[int, int] | None = None) -> Shape:
        """Sizes of a model or of its config; `image`: (height, width) in pixels, where the number of tokens depends on it."""
        raise NotImplementedError

    def prune(self, model: nn.Module, planner: Any, options: PruneOptions) -> AbstractContextManager:
        """Context in which the forward of `model` runs pruned; it yields a run with a `trace`."""
        from ivtp.backbones.vlm.model import pruned

        return pruned(model, options.adapter or self.adapter(model), planner, options)


F = TypeVar("F", bound=Family)
_families: dict[str, Family] = {}

REGISTRATION = re.compile(r"^@register_family\(([^)]*)\)", re.MULTILINE)


def register_family(*names: str) -> Callable[[type[F]], type[F]]:
    """Decorator: register a family under transformers' `model_type`, or under package and class ("timm.Eva").

    Modules of `families` (vision-language models) and `vision` (encoders) are imported when a model of theirs is first
    met; the names, which must be literals, are read from their source. A duplicate name raises ValueError.
    """

    def register(family: type[F]) -> type[F]:
        for name in names:
            module = _modules().get(name, family.__module__)
            if name in _families or module != family.__module__:
                raise ValueError(f"model family {name!r} is already registered by {module}; choose another name")
            _families[name] = family()
        return family

    return register


@cache
def _modules(*folders: str) -> dict[str, str]:
    """Module of each family by name. Reading the source avoids the import of timm, open_clip and transformers."""
    modules: dict[str, str] = {}
    for folder in folders or ("families", "vision"):
        for path in sorted((Path(__file__).parent / folder).glob("*.py")):
            for arguments in REGISTRATION.findall(path.read_text(encoding="utf-8")):
                modules |= dict.fromkeys(re.findall(r'"([^"]+)"', arguments), f"{__package__}.{folder}.{path.stem}")
    return modules


def language_families() -> list[str]:
    """Names of the families with a language model."""
    return sorted(_modules("families"))


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of torch.compile and PEFT."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", ()):
            model = model._orig_mod
        elif isinstance(model, nn.Module) and (base := getattr(model, "get_base_model", None)):
            model = base()
        else:
            return model


def family_of(model: Any) -> Family:
    """The family of a model or of its config; raises ModelError for one that is not supported."""
    if isinstance(getattr(model, "module", None), nn.Module):
        raise ModelError(f"{type(model).__name__} wraps the model; prune what is inside: ivtp.prune(model.module, ...)")
    config = getattr(model, "config", model)
    classes = [f"{c.__module__.split('.')[0]}.{c.__name__}" for c in type(model).__mro__]
    names = [getattr(config, "model_type", ""), *classes]
    for name in names:
        if name in _modules() and name not in _families:
            import_module(_modules()[name])
        if name in _families:
            return _families[name]
    raise ModelError(unknown("model family", str(names[0] or names[1]), {*_modules(), *_families}))


def shape_of(model: Any, image: tuple[int, int] | None = None) -> Shape:
    """Sizes that pruning and cost depend on, of a model or of a transformers config.

    image  height and width in pixels of an image, for families whose number of tokens depends on it; None: a usual one

    >>> from transformers import LlavaConfig
    >>> shape = shape_of(LlavaConfig())
    >>> shape.tokens, shape.vision.depth, shape.language.depth
    (576, 24, 32)
    """
    model = unwrapped(model)
    family = family_of(model)
    shape = family.shape(model)
    if image is None:
        return shape
    if not shape.by_image:
        raise ModelError(
            f"image={list(image)}, but every image has the same number of tokens in this model; leave it out"
        )
    return family.shape(model, image)


def layers_of(config: Any, ffn: int | None = None, gated: bool = False) -> Layers:
    """Sizes of the transformer layers of a transformers config; `ffn`: width of the FFN, by default as the config says."""
    width, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or width // heads
    ffn_width = config.intermediate_size if ffn is None else ffn
    return Layers(config.num_hidden_layers, width, ffn_width, heads, kv_heads, head_width, 3 if gated else 2)
