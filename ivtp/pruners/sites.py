"""Where methods prune by default: layers and groups of each site."""

from __future__ import annotations

from collections.abc import Sequence

from ivtp.pruning.cost import Shape
from ivtp.pruning.schedules import Cut, equal_ratio, group_ends


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


def feature_cut(shape: Shape, keep: int) -> tuple[Cut, ...]:
    """One cut behind the penultimate ViT layer, whose output is what LLaVA's projector reads."""
    return (Cut(max(0, shape.vision.depth - 2), keep, "block"),)


def language_depth(shape: Shape, name: str) -> int:
    """Layers of the language model; raises ValueError where there is none."""
    if shape.language is None:
        raise ValueError(f"{name} prunes inside a language model, but this model has none")
    return shape.language.depth


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


def grouped(layers: int, group: int | str, tokens: int, keep: int, after: str = "attn") -> tuple[Cut, ...]:
    """One cut at the end of every group, each keeping the same share, down to `keep`."""
    ends = group_ends(layers, group)
    counts = equal_ratio(tokens, keep, len(ends))
    return tuple(Cut(layer, count, after) for layer, count in zip(ends, counts, strict=True))
