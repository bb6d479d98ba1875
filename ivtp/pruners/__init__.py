"""Methods by name: each is a function (shape, keep, settings) → Plan, a composition of the four choices.

Add one with `@register_pruner`, or from another package with the entry point group `ivtp.pruners`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import UnionType
from typing import get_args, get_type_hints

from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan
from ivtp.pruning.schedules import check
from ivtp.registry import Registry, UnknownName, unknown

PER = ("image", "crop")
PRUNERS = Registry("pruner", "ivtp.pruners")
register_pruner = PRUNERS.register


def list_pruners() -> list[str]:
    """The names of all pruners, those of installed third-party packages included.

    >>> [name for name in list_pruners() if name.startswith("t")]
    ['tome', 'tome_plus', 'topk', 'topk_plus']
    """
    return PRUNERS.names()


def load_pruner(name: str, shape: Shape, position_ids: str = "keep", per: str = "image", **settings) -> Plan:
    """The plan of method `name` for a model of this shape; refuses what cannot be carried out.

    per   what `keep` counts: the tokens of a whole "image", spread evenly over its crops, or those of each "crop"
    Raises ValueError for an unknown name or setting, and for a budget that the model or the method cannot meet.

    >>> import ivtp
    >>> from transformers import LlavaConfig  # its defaults are the sizes of LLaVA-1.5-7B
    >>> plan = ivtp.load_pruner("ivtp", ivtp.shape_of(LlavaConfig()), keep=64)
    >>> [cut.keep for cut in plan.vision.schedule]
    [480, 399, 333, 277, 231, 192, 160, 133]
    >>> [(cut.layer, cut.keep) for cut in plan.language.schedule]
    [(2, 111), (5, 92), (8, 77), (11, 64)]
    """
    if per not in PER:
        raise ValueError(f"per={per!r} is not one of {', '.join(PER)}: what keep counts")
    if shape.crops > 1:
        return _by_crops(name, shape, position_ids, per, settings)
    build = PRUNERS[name]
    accepted = [p for p in inspect.signature(build).parameters if p != "shape"]
    for key in settings:
        if key not in accepted:
            raise UnknownName(unknown(f"setting of pruner {name!r}:", key, [*accepted, "position_ids"]))
    keep = settings.get("keep")
    if "keep" in settings and (isinstance(keep, bool) or not isinstance(keep, int)):
        raise ValueError(f"keep={keep!r} must be a whole number of visual tokens between 1 and {shape.patches}")
    if keep is not None and not 1 <= keep <= shape.patches:
        raise ValueError(
            f"keep={keep}, but an image has {shape.patches} visual tokens; keep between 1 and {shape.patches}"
        )
    if "keep" in accepted and keep is None:
        raise ValueError(f"pruner {name!r} needs keep: how many visual tokens stay, between 1 and {shape.patches}")
    check_types(build, settings)
    plan = replace(build(shape, **settings), position_ids=position_ids)
    v = shape.patches
    if plan.vision is not None:
        check(plan.vision.schedule, v, shape.vision.depth, "vision")
        v = plan.vision.schedule[-1].keep if plan.vision.schedule else v
    if plan.language is not None:
        if shape.language is None:
            raise ValueError(f"pruner {name!r} prunes inside a language model, but this model has none")
        check(plan.language.schedule, v, shape.language.depth, "language")
    return plan


def _by_crops(name: str, shape: Shape, position_ids: str, per: str, settings: dict) -> Plan:
    """The plan for an image in crops: the tower's cuts are of one crop, the language model's of the whole image."""
    each, whole = dict(settings), dict(settings)
    one, all_of_it = replace(shape, crops=1), replace(shape, crops=1, patches=shape.tokens, columns=shape.tokens)
    keep = settings.get("keep")
    if isinstance(keep, int):
        if per == "image" and not shape.crops <= keep <= shape.tokens:
            raise ValueError(
                f"keep={keep}, but an image of {shape.crops} crops has {shape.tokens} visual tokens; keep at least one of "
                f"each crop, {shape.crops}, and at most {shape.tokens}, or count by crop (per='crop')"
            )
        each["keep"] = round(keep / shape.crops) if per == "image" else keep
        whole["keep"] = keep if per == "image" else keep * shape.crops
    of_image = load_pruner(name, all_of_it, position_ids, **whole)
    if of_image.vision is None and of_image.image is None:
        return of_image
    of_crop = load_pruner(name, one, position_ids, **each)
    reach = of_crop.leaving(shape.patches, shape.crops)
    return replace(of_crop, language=of_image.language).reached_by(reach)


NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def check_types(build: Callable, settings: Mapping[str, object]) -> None:
    """Refuse settings that are not what the method's annotations ask for: a number, a text, …"""
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


# Each module registers its pruners when it is imported.
from ivtp.pruners import (  # noqa: E402, F401
    ats,
    baselines,
    both_sites,
    cdpruner,
    dart,
    divprune,
    evit,
    fastervlm,
    fastv,
    hiprune,
    ivtp,
    pdrop,
    prumerge,
    resolution,
    sparsevlm,
    tome,
    visionzip,
    vispruner,
    vscan,
)
