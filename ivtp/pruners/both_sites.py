"""TopK+ and ToMe+: single-site methods of the paper's Table 7, continued inside the language model."""

from __future__ import annotations

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import part1_layers, vision_layers
from ivtp.pruners.tome import check_halving
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner, keys
from ivtp.pruning.reduces import merge
from ivtp.pruning.schedules import Cut, equal_ratio, group_ends
from ivtp.pruning.scores import Layerwise
from ivtp.pruning.selects import bipartite


@register_pruner
def topk_plus(
    shape: Shape, keep: int, group: int | str = 3, language_group: int | str = 3, part1: int | None = None
) -> Plan:
    """TopK+ (Table 7 of 10.1007/978-3-031-72643-9_13): TopK in the ViT, then in the first LLM layers by the last token.

    Scores     attention of the CLS, then of the last prompt token, in the current layer, mean over heads
    Where      after whole layers, at the ends of the groups that IVTP cuts in, with its shares: the cost is IVTP's

    The paper does not say who refers inside the language model; the last token is what a causal model has in place of CLS.
    """
    vision, language = _cuts("topk_plus", shape, keep, group, language_group, part1, "block")
    return Plan(vision=Pruner(vision, Layerwise()), language=Pruner(language, Layerwise()))


@register_pruner
def tome_plus(
    shape: Shape,
    keep: int,
    group: int | str = 3,
    language_group: int | str = 3,
    part1: int | None = None,
    proportional: bool = True,
) -> Plan:
    """ToMe+ (Table 7 of 10.1007/978-3-031-72643-9_13): ToMe in the ViT, then in the first LLM layers.

    Merges the most similar keys at the ends of the groups that IVTP cuts in, with its shares, so that the cost is IVTP's.
    A merged token keeps the place of the one that took it in; earlier layers keep the keys and values of both. Whether
    sizes weigh in the language model's attention the paper does not say: they do not here.
    """
    vision, language = _cuts("tome_plus", shape, keep, group, language_group, part1, "attn")
    check_halving(shape.patches, (*vision, *language), group)
    in_vision = Pruner(vision, select=bipartite, reduce=merge, metric=keys, proportional=proportional)
    return Plan(vision=in_vision, language=Pruner(language, select=bipartite, reduce=merge, metric=keys))


def _cuts(
    name: str, shape: Shape, keep: int, group: int | str, language_group: int | str, part1: int | None, after: str
) -> tuple[tuple[Cut, ...], tuple[Cut, ...]]:
    """IVTP's schedule: the same share at every cut of both sites."""
    if shape.language is None:
        raise ValueError(f"{name} prunes inside a language model, but this model has none")
    part1 = part1_layers(shape) if part1 is None else part1
    if not 1 <= part1 <= shape.language.depth:
        raise ValueError(f"part1={part1} must be between 1 and the {shape.language.depth} layers of the language model")
    in_vision, in_language = group_ends(vision_layers(shape), group), group_ends(part1, language_group)
    counts = equal_ratio(shape.patches, keep, len(in_vision) + len(in_language))
    cuts = [Cut(layer, count, after) for layer, count in zip(in_vision + in_language, counts, strict=True)]
    return tuple(cuts[: len(in_vision)]), tuple(cuts[len(in_vision) :])
