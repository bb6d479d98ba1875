"""The frozen model itself, and the single-site methods the paper compares with or ablates."""

from __future__ import annotations

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import grouped, vision_layers
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.scores import Chance, Layerwise, Rollout, Score


@register_pruner
def none(shape: Shape) -> Plan:
    """The model as it is: nothing is pruned."""
    return Plan()


@register_pruner
def random(shape: Shape, keep: int, group: int | str = 3, seed: int = 0) -> Plan:
    """Uniform choice in the ViT at the same places as the group-wise methods: the floor every method must beat."""
    return _in_vision(shape, keep, group, Chance(seed))


@register_pruner
def topk(shape: Shape, keep: int, group: int | str = 3) -> Plan:
    """TopK of the paper's tables: the current layer's CLS attention decides, after the whole layer, in the ViT."""
    return _in_vision(shape, keep, group, Layerwise(value_norm=False), after="block")


@register_pruner
def layerwise(shape: Shape, keep: int, group: int | str = 3, value_norm: bool = True) -> Plan:
    """Table 4: group-wise pruning by the last layer's CLS attention instead of the rollout."""
    return _in_vision(shape, keep, group, Layerwise(value_norm))


@register_pruner
def group_mean(shape: Shape, keep: int, group: int | str = 3, value_norm: bool = True) -> Plan:
    """Table 4: group-wise pruning by the mean of the group's CLS attentions instead of the rollout."""
    return _in_vision(shape, keep, group, Rollout("mean", value_norm))


@register_pruner
def rollout(shape: Shape, keep: int, group: int | str = 3, combine: str = "residual", value_norm: bool = True) -> Plan:
    """Group-wise Token Pruning in the ViT (IVTP, Eq. 2–4); `combine` is the paper's Table 5."""
    return _in_vision(shape, keep, group, Rollout(combine, value_norm))


@register_pruner
def ivtp_v(shape: Shape, keep: int, group: int | str = 3) -> Plan:
    """IVTP-V (Table 7): the paper's stage 1 alone, down to the whole budget inside the ViT."""
    return rollout(shape, keep, group)


def _in_vision(shape: Shape, keep: int, group: int | str, score: Score, after: str = "attn") -> Plan:
    return Plan(vision=Pruner(grouped(vision_layers(shape), group, shape.patches, keep, after), score))
