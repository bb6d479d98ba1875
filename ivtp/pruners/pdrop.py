"""PyramidDrop: a share of the image tokens leaves at every stage of the language model."""

from __future__ import annotations

from collections.abc import Sequence

from ivtp.core import Plan, Schedule, Shape, Stage
from ivtp.core.schedule import equal_ratio
from ivtp.core.scores import Layerwise
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import language_depth, listed_layers


@register_pruner
def pdrop(shape: Shape, keep: int, layers: Sequence[int] | None = None) -> Plan:
    """PyramidDrop (arXiv 2410.17247): cuts before some language layers, ranked by the attention of that very layer.

    Scores     attention of the last prompt token, from the q and k of the layer behind the cut, mean over heads
    Selects    the highest, in sequence order
    The rest   is dropped
    Where      before the `layers`, by default at 1/4, 1/2 and 3/4 of the stack (8, 16, 24 of 32); every stage keeps the
               same share, so `keep` is left behind the last one (published: λ = 0.5, 576 → 288 144 72)
    Budgets    72 (published); averages of 192, 128, 64 in comparisons are other shares at the same layers

    Published scripts give explicit shares of the first count, truncated (the paper: λ to the power of the stage); the
    same counts for λ = 0.5. Positions are renumbered after each drop there: position_ids=renumber does that. Its
    scores do not repeat shared key heads, so they are defined for equal head counts only; here they are repeated.
    """
    depth = language_depth(shape, "pdrop")
    if layers is None:
        layers = sorted({max(1, round(depth * part / 4)) for part in (1, 2, 3)} - {depth})
    layers = listed_layers(layers, 1, depth - 1)
    counts = equal_ratio(shape.patches, keep, len(layers))
    schedule = Schedule.at([layer - 1 for layer in layers], counts, "block")
    return Plan(language=Stage(schedule, Layerwise(needs="next")))
