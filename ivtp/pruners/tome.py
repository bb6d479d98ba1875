"""Token merging."""

from __future__ import annotations

from collections.abc import Sequence

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import grouped, vision_layers
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner, keys
from ivtp.pruning.reduces import merge
from ivtp.pruning.schedules import Cut, group_ends
from ivtp.pruning.selects import bipartite

SCHEDULES = ("ratio", "constant", "decreasing")


@register_pruner
def tome(shape: Shape, keep: int, group: int | str = 1, proportional: bool = True, schedule: str = "ratio") -> Plan:
    """ToMe (arXiv 2210.09461): in every ViT layer the most similar keys are averaged, merged tokens weigh by size.

    The paper merges a constant r per layer, or a number that falls to zero at the last one (`constant`, `decreasing`:
    the smallest r that meets the budget; what the last cuts would merge too much stays). By default every layer keeps
    the same share, as all methods do at a budget. One merge can halve the tokens at most.

    Against the published code: none that shows in a result. It keeps the class token out of the merging (the paper does
    not say so), and truncates the falling schedule to whole numbers.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    layers = vision_layers(shape)
    cuts = grouped(layers, group, shape.patches, keep)
    if schedule != "ratio":
        cuts = _by_count(
            group_ends(layers, group), shape.patches, keep, inflect=-1.0 if schedule == "decreasing" else 0.0
        )
    check_halving(shape.patches, cuts, group)
    return Plan(vision=Pruner(cuts, select=bipartite, reduce=merge, metric=keys, proportional=proportional))


def check_halving(before: int, cuts: Sequence[Cut], group: int | str) -> None:
    """Refuse a schedule that merges more than half of the tokens in one cut."""
    for cut in cuts:
        if before - cut.keep > before // 2:
            raise ValueError(
                f"keep={cuts[-1].keep}: {before} → {cut.keep} tokens at layer {cut.layer}, but one merge can at most "
                f"halve them, down to {before - before // 2}; keep more or use smaller groups (group={group})"
            )
        before = cut.keep


def _by_count(layers: list[int], tokens: int, keep: int, inflect: float) -> tuple[Cut, ...]:
    """The published schedules with the smallest r that comes down to `keep`, which is then met exactly."""
    merges = next(
        found for r in range(tokens + 1) if sum(found := merges_per_layer(r, len(layers), inflect)) >= tokens - keep
    )
    cuts, left = [], tokens
    for layer, count in zip(layers, merges, strict=True):
        left = max(keep, left - count)
        cuts.append(Cut(layer, left))
    return tuple(cuts)


def merges_per_layer(r: int | Sequence[int], layers: int, inflect: float = 0.0) -> list[int]:
    """Merges in every layer, as the published code counts: r, tilted by `inflect` (-1: falling to 0, +1: rising from
    0).

    A list is taken as it is and goes on with zeros.
    """
    if isinstance(r, Sequence):
        return [int(count) for count in r] + [0] * (layers - len(r))
    low = int(r * (1 - inflect))
    step = (2 * r - 2 * low) / max(1, layers - 1)
    return [int(low + step * layer) for layer in range(layers)]
