"""Layers and groups of each site in which methods prune by default, and the schedules that several methods share."""

from __future__ import annotations

from collections.abc import Sequence

from ivtp.core.flops import Shape
from ivtp.core.schedule import Schedule, equal_ratio, group_ends
from ivtp.registry import check_range


def vision_layers(shape: Shape) -> int:
    """Layers of the vision tower that are grouped: the largest multiple of 12, so that groups of 2, 3, 4, 6 and all of
    them end at the same layer (24 of 24 in LLaVA-1.5; 12 of 13 in the embedded model, whose feature is read there).
    Towers of fewer than 12 layers are grouped whole. Our choice; the paper has 24 layers only."""
    depth = shape.vision.depth
    return depth - depth % 12 if depth >= 12 else depth


def part1_layers(shape: Shape) -> int:
    """W, the leading LLM layers in which the paper prunes: 3/8 of them, at most 12 (12 of 32 for 7B; 12 taken for 13B)."""
    depth = shape.language.depth if shape.language else 0
    return max(1, min(12, 3 * depth // 8)) if depth else 0


def grouped(shape: Shape, keep: int, group: int | str, after: str = "attn") -> Schedule:
    """One cut at the end of every group of the tower's layers, each keeping the same share, down to `keep`."""
    ends = group_ends(vision_layers(shape), group)
    return Schedule.at(ends, equal_ratio(shape.patches, keep, len(ends)), after)


def both_ends(
    shape: Shape, name: str, group: int | str, language_group: int | str, part1: int | None
) -> tuple[list[int], list[int], int]:
    """Ends of IVTP's groups in the tower and in the leading language layers, and the number of these: by default W."""
    depth, part1 = language_depth(shape, name), part1_layers(shape) if part1 is None else part1
    check_range("part1", part1, 1, depth, ", the layers of the language model")
    return group_ends(vision_layers(shape), group), group_ends(part1, language_group), part1


def at_both_sites(
    shape: Shape, keep: int, vision: list[int], language: list[int], after: str = "attn", vision_keep: int | None = None
) -> tuple[Schedule, Schedule]:
    """Cuts at these layers of both sites: the same share at each; if `vision_keep` leave the tower, at each of one site."""
    leave = len(vision)
    if vision_keep is None:
        counts = equal_ratio(shape.patches, keep, leave + len(language))
    else:
        counts = equal_ratio(shape.patches, vision_keep, leave) + equal_ratio(vision_keep, keep, len(language))
    return Schedule.at(vision, counts[:leave], after), Schedule.at(language, counts[leave:], after)


def feature_cut(shape: Shape, keep: int) -> Schedule:
    """One cut behind the penultimate ViT layer, whose output is what LLaVA's projector reads."""
    return Schedule.at([max(0, shape.vision.depth - 2)], [keep], "block")


def language_depth(shape: Shape, name: str) -> int:
    """Layers of the language model; raises ValueError where there is none."""
    if shape.language is None:
        raise ValueError(f"{name} prunes inside a language model, but this model has none")
    return shape.language.depth


def check_vision_keep(shape: Shape, keep: int, vision_keep: int) -> None:
    """Refuse more tokens behind the tower than there are, or fewer than stay."""
    if not keep <= vision_keep <= shape.patches:
        raise ValueError(f"vision_keep={vision_keep} must be between keep={keep} and {shape.patches}")


def before_language(shape: Shape, name: str, layer: int, keep: int) -> Schedule:
    """One cut before a language layer; raises ValueError where that layer, or one before it, does not exist."""
    last = language_depth(shape, name) - 1
    check_range("layer", layer, 1, last, ": some layer before it, and itself, must exist")
    return Schedule.at([layer - 1], [keep], "block")


def listed_layers(layers: Sequence[int], first: int, last: int) -> list[int]:
    """Layers that a user lists; raises ValueError for anything but rising whole numbers from `first` to `last`."""
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"layers={layers!r} must be a list of whole numbers between {first} and {last}")
    layers = list(layers)
    if not layers or layers != sorted(set(layers)):
        raise ValueError(f"layers={layers} must name at least one layer, each once, in rising order")
    for layer in (layers[0], layers[-1]):
        if not first <= layer <= last:
            raise ValueError(f"layers={layers}: {layer} must be between {first} and {last} in this language model")
    return layers
