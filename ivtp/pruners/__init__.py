"""Pruners by name: each is a function (shape, keep, settings) → Plan, a composition of the four choices.

Every module in this folder is imported, and adds its own with `@register_pruner`; another package names its own in the
entry point group `ivtp.pruners`. Name, settings and their defaults, and the line of help come from the function alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from types import UnionType
from typing import Protocol, get_args, get_type_hints

from ivtp.core.flops import Shape
from ivtp.core.plan import Plan
from ivtp.pruners.default_layers import language_depth
from ivtp.registry import Registry, UnknownName, check_choice, unknown
from ivtp.text import first_sentence

PER = ("image", "crop")


class Pruner(Protocol):
    """A pruning method as users and configs name it: a function of a model's sizes and of settings that returns a plan.

    shape     sizes of the model
    settings  annotated, with defaults where there is one; `keep`, the visual tokens that stay, is one of them
    """

    def __call__(self, shape: Shape, **settings) -> Plan: ...

    def __new__(cls, *_, **__):
        if cls is Pruner:
            raise TypeError(
                "ivtp.Pruner, of a schedule, a score and so on, is called ivtp.Stage now: ivtp.Stage(cuts, score)"
            )
        return super().__new__(cls)


PRUNERS = Registry("pruner", "ivtp.pruners")
register_pruner = PRUNERS.register


def list_pruners() -> list[str]:
    """The names of all pruners, those of installed third-party packages included.

    >>> [name for name in list_pruners() if name.startswith("t")]
    ['tome', 'tome_plus', 'topk', 'topk_plus']
    """
    return PRUNERS.names()


def shipped_pruners() -> list[str]:
    """The names of the pruners of this package, without those of other installed packages."""
    return [name for name in list_pruners() if PRUNERS[name].__module__.startswith(f"{__name__}.")]


def summary(name: str) -> str:
    """The first sentence of a pruner's docstring.

    >>> summary("none")
    'The frozen model as it is, without pruning.'
    """
    return first_sentence(inspect.getdoc(PRUNERS[name]))


def load_pruner(name: str, shape: Shape, position_ids: str = "keep", per: str = "image", **settings) -> Plan:
    """The plan of pruner `name` for a model of this shape.

    per   `keep` counts the tokens of a whole "image", spread evenly over its crops, or those of each "crop"
    Raises ValueError for an unknown name or setting, and for a budget that the model or the method cannot meet.

    >>> import ivtp
    >>> from transformers import LlavaConfig  # its defaults are the sizes of LLaVA-1.5-7B
    >>> plan = ivtp.load_pruner("ivtp", ivtp.shape_of(LlavaConfig()), keep=64)
    >>> [cut.keep for cut in plan.vision.schedule]
    [480, 399, 333, 277, 231, 192, 160, 133]
    >>> [(cut.layer, cut.keep) for cut in plan.language.schedule]
    [(2, 111), (5, 92), (8, 77), (11, 64)]
    """
    check_choice("per", per, PER, ": what keep counts")
    if shape.crops > 1:
        return _by_crops(name, shape, position_ids, per, settings)
    build = PRUNERS[name]
    accepted = [p for p in inspect.signature(build).parameters if p != "shape"]
    for key in settings:
        if key not in accepted:
            raise UnknownName(unknown(f"setting of pruner {name!r}:", key, [*accepted, "position_ids"]))
    keep = settings.get("keep")
    if "keep" in settings and type(keep) is not int:
        raise ValueError(f"keep={keep!r} must be a whole number of visual tokens between 1 and {shape.patches}")
    if keep is not None and not 1 <= keep <= shape.patches:
        raise ValueError(
            f"keep={keep}, but an image has {shape.patches} visual tokens; keep between 1 and {shape.patches}"
        )
    if "keep" in accepted and keep is None:
        raise ValueError(f"pruner {name!r} needs keep: how many visual tokens stay, between 1 and {shape.patches}")
    check_types(build, settings)
    plan = replace(build(shape, **settings), position_ids=position_ids)
    check_plan(plan, shape, f"pruner {name!r}")
    return plan


def check_plan(plan: Plan, shape: Shape, name: str = "the plan") -> None:
    """Refuse a plan that cannot be carried out on an image of this shape."""
    if plan.vision is not None:
        plan.vision.schedule.check(shape.patches, shape.vision.depth, "vision")
    if plan.language is not None:
        depth = language_depth(shape, name)
        plan.language.schedule.check(plan.leaving(shape.patches, shape.crops), depth, "language")


def _by_crops(name: str, shape: Shape, position_ids: str, per: str, settings: dict) -> Plan:
    """The plan for an image in crops: the tower's cuts are of one crop, the language model's of the whole image."""
    each, whole = dict(settings), dict(settings)
    keep = settings.get("keep")
    if isinstance(keep, int):
        if per == "image" and not shape.crops <= keep <= shape.tokens:
            raise ValueError(
                f"keep={keep}, but an image of {shape.crops} crops has {shape.tokens} visual tokens; keep at least one of "
                f"each crop, {shape.crops}, and at most {shape.tokens}, or count by crop (per='crop')"
            )
        each["keep"] = round(keep / shape.crops) if per == "image" else keep
        whole["keep"] = keep if per == "image" else keep * shape.crops
    of_image = load_pruner(name, shape.in_one_crop(shape.tokens), position_ids, **whole)
    if of_image.vision is None and of_image.image is None:
        return of_image
    of_crop = load_pruner(name, replace(shape, crops=1), position_ids, **each)
    reach = of_crop.leaving(shape.patches, shape.crops)
    return replace(of_crop, language=of_image.language).reached_by(reach)


NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def check_types(build: Pruner, settings: Mapping[str, object]) -> None:
    """Refuse settings whose types are not those of the pruner's annotations."""
    try:
        hints = get_type_hints(build)
    except NameError:  # somebody else's annotations
        return
    for key, value in settings.items():
        hint = hints.get(key, object)
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if not set(kinds) <= set(NOUNS):
            continue
        fits = type(value) in kinds or (float in kinds and type(value) is int)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            default = inspect.signature(build).parameters[key].default
            usual = "" if default is inspect.Parameter.empty else f"; the default is {default}"
            raise ValueError(f"{key}={value!r} is not {' or '.join(NOUNS[kind] for kind in kinds)}{usual}")


for module in iter_modules(__path__):  # each registers its pruners
    import_module(f"{__name__}.{module.name}")
