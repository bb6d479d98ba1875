"""FastV: one cut early in the language model."""

from __future__ import annotations

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import language_depth
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.schedules import Cut
from ivtp.pruning.scores import Layerwise


@register_pruner
def fastv(shape: Shape, keep: int, layer: int = 2) -> Plan:
    """FastV (arXiv 2403.06764): after `layer` language layers, what the last prompt token does not look at goes.

    Scores     attention of the last prompt token in layer `layer` - 1, mean over heads
    Selects    the highest, in sequence order
    The rest   is dropped; earlier layers keep its keys and values
    Where      once, before language layer 2 (0-based)

    Published code: the score is the attention of the last token; the paper says the average over all tokens (code
    followed). Its positions stay the original ones, as here by default. It applies the choice of the first sample of a
    batch to all samples (a bug; here every sample has its own), and rounds a drop ratio where we count tokens.
    """
    depth = language_depth(shape, "fastv")
    if not 1 <= layer <= depth - 1:
        raise ValueError(
            f"layer={layer} must be between 1 and {depth - 1}: some layer before it, and itself, must exist"
        )
    return Plan(language=Pruner((Cut(layer - 1, keep, "block"),), Layerwise()))
