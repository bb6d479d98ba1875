"""Token merging: ToMe, and ToMe+, which goes on inside the language model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ivtp.core import Plan, Schedule, Shape, Stage
from ivtp.core.reduces import Merge
from ivtp.core.schedule import group_ends
from ivtp.core.selects import Bipartite, Keys
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import at_both_sites, both_ends, grouped, vision_layers
from ivtp.registry import check_choice

SCHEDULES = ("ratio", "constant", "decreasing")


@register_pruner
def tome(shape: Shape, keep: int, group: int | str = 1, proportional: bool = True, schedule: str = "ratio") -> Plan:
    """ToMe (arXiv 2210.09461): in every ViT layer the tokens with the most similar keys are averaged.

    proportional  merged tokens weigh by size in attention, as published

    The paper merges a constant r per layer, or a number that falls to zero at the last one (`constant`, `decreasing`:
    the smallest r that meets the budget; what the last cuts would merge too much stays). By default every layer keeps
    the same share, as all methods do at a budget. One merge can halve the tokens at most.

    Against the published code: none that shows in a result. It keeps the class token out of the merging (the paper does
    not say so), and truncates the falling schedule to whole numbers.
    """
    check_choice("schedule", schedule, SCHEDULES)
    cuts = grouped(shape, keep, group)
    if schedule != "ratio":
        layers = group_ends(vision_layers(shape), group)
        cuts = _by_count(layers, shape.patches, keep, inflect=-1.0 if schedule == "decreasing" else 0.0)
    check_halving(shape.patches, cuts, group)
    return Plan(vision=_merging(cuts, proportional))


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
    vision, language, _ = both_ends(shape, "tome_plus", group, language_group, part1)
    first, second = at_both_sites(shape, keep, vision, language)
    check_halving(shape.patches, Schedule((*first, *second)), group)
    return Plan(vision=_merging(first, proportional), language=_merging(second, False))


def _merging(cuts: Schedule, proportional: bool) -> Stage:
    return Stage(cuts, select=Bipartite(), reduce=Merge(), metric=Keys(), proportional=proportional)


def check_halving(before: int, cuts: Schedule, group: int | str) -> None:
    """Refuse a schedule that merges more than half of the tokens in one cut."""
    for cut in cuts:
        if before - cut.keep > before // 2:
            raise ValueError(
                f"keep={cuts[-1].keep}: {before} → {cut.keep} tokens at layer {cut.layer}, but one merge can at most "
                f"halve them, down to {before - before // 2}; keep more or use smaller groups (group={group})"
            )
        before = cut.keep


def _by_count(layers: list[int], tokens: int, keep: int, inflect: float) -> Schedule:
    """The published schedules with the smallest r that comes down to `keep`, which is then met exactly."""
    merges = next(
        counts for r in range(tokens + 1) if sum(counts := merges_per_layer(r, len(layers), inflect)) >= tokens - keep
    )
    return Schedule.at(layers, [max(keep, tokens - merged) for merged in accumulate(merges)])


def merges_per_layer(r: int | Sequence[int], layers: int, inflect: float = 0.0) -> list[int]:
    """Merges in every layer, as the published code counts: r, tilted by `inflect` (-1: down to 0, +1: up from 0).

    A list is taken as it is and goes on with zeros.
    """
    if isinstance(r, Sequence):
        return [int(count) for count in r] + [0] * (layers - len(r))
    low = int(r * (1 - inflect))
    step = (2 * r - 2 * low) / max(1, layers - 1)
    return [int(low + step * layer) for layer in range(layers)]
