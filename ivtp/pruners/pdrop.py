"""PyramidDrop: a share of the image tokens leaves at every stage of the language model."""

from __future__ import annotations

from collections.abc import Sequence

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import language_depth, listed_layers
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.schedules import Cut, equal_ratio
from ivtp.pruning.scores import Layerwise


@register_pruner
def pdrop(shape: Shape, keep: int, layers: Sequence[int] | None = None) -> Plan:
    """PyramidDrop (arXiv 2410.17247): before some language layers, ranked by what that very layer is about to look at.

    Scores     attention of the last prompt token, from the q and k of the layer behind the cut, mean over heads
    Selects    the highest, in sequence order
    The rest   is dropped
    Where      before the `layers`, by default at 1/4, 1/2 and 3/4 of the stack (8, 16, 24 of 32); every stage keeps the
               same share, so `keep` is what is left behind the last one (published: λ = 0.5, 576 → 288 144 72)

    Published scripts give explicit shares of the first count, truncated (the paper: λ to the power of the stage); the
    same counts for λ = 0.5. Positions are renumbered after each drop there: position_ids=renumber does that. Its
    scores do not repeat shared key heads, so they are defined for equal head counts only; here they are repeated.
    """
    depth = language_depth(shape, "pdrop")
    if layers is None:
        layers = sorted({max(1, round(depth * part / 4)) for part in (1, 2, 3)} - {depth})
    layers = listed_layers(layers, 1, depth - 1)
    counts = equal_ratio(shape.patches, keep, len(layers))
    cuts = [Cut(layer - 1, count, "block") for layer, count in zip(layers, counts, strict=True)]
    return Plan(language=Pruner(tuple(cuts), Layerwise(needs="next")))
