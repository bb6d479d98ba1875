"""The frozen model itself, and the methods that the paper compares with or ablates."""

from __future__ import annotations

from ivtp.core import Plan, Score, Shape, Stage
from ivtp.core.scores import Layerwise, Random, Rollout
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import at_both_sites, both_ends, grouped


@register_pruner
def none(shape: Shape) -> Plan:
    """The frozen model as it is, without pruning."""
    return Plan()


@register_pruner
def random(shape: Shape, keep: int, group: int | str = 3, seed: int = 0) -> Plan:
    """Uniform choice in the ViT at the same places as the group-wise methods: the floor every method must beat."""
    return _plan(shape, keep, group, Random(seed))


@register_pruner
def topk(shape: Shape, keep: int, group: int | str = 3) -> Plan:
    """TopK of the paper's tables: pruning in the ViT by the current layer's CLS attention, after the whole layer."""
    return _plan(shape, keep, group, Layerwise(value_norm=False), "block")


@register_pruner
def topk_plus(
    shape: Shape, keep: int, group: int | str = 3, language_group: int | str = 3, part1: int | None = None
) -> Plan:
    """TopK+ (Table 7 of 10.1007/978-3-031-72643-9_13): TopK in the ViT, then in the first LLM layers by the last token.

    Scores     attention of the CLS, then of the last prompt token, in the current layer, mean over heads
    Where      after whole layers, at the ends of the groups that IVTP cuts in, with its shares: the cost is IVTP's

    The paper does not name the reference token inside the language model; a causal model has its last token in place of CLS.
    """
    vision, language, _ = both_ends(shape, "topk_plus", group, language_group, part1)
    first, second = at_both_sites(shape, keep, vision, language, "block")
    return Plan(vision=Stage(first, Layerwise()), language=Stage(second, Layerwise()))


@register_pruner
def layerwise(shape: Shape, keep: int, group: int | str = 3, value_norm: bool = True) -> Plan:
    """Group-wise pruning in the ViT by the last layer's CLS attention instead of the rollout (IVTP, Table 4)."""
    return _plan(shape, keep, group, Layerwise(value_norm))


@register_pruner
def group_mean(shape: Shape, keep: int, group: int | str = 3, value_norm: bool = True) -> Plan:
    """Group-wise pruning in the ViT by the mean of the group's CLS attentions instead of the rollout (IVTP, Table 4)."""
    return _plan(shape, keep, group, Rollout("mean", value_norm))


@register_pruner
def rollout(shape: Shape, keep: int, group: int | str = 3, combine: str = "residual", value_norm: bool = True) -> Plan:
    """Group-wise Token Pruning in the ViT by attention rollout (IVTP, Eq. 2–4; `combine`: Table 5).

    combine  "residual", "mean", "max" or "multiply", as in `ivtp.core.scores.Rollout`
    """
    return _plan(shape, keep, group, Rollout(combine, value_norm))


@register_pruner
def ivtp_v(shape: Shape, keep: int, group: int | str = 3) -> Plan:
    """IVTP-V (Table 7): the paper's stage 1 alone, down to the whole budget inside the ViT."""
    return rollout(shape, keep, group)


def _plan(shape: Shape, keep: int, group: int | str, score: Score, after: str = "attn") -> Plan:
    return Plan(vision=Stage(grouped(shape, keep, group, after), score))
