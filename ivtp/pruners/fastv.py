"""FastV: one cut early in the language model."""

from __future__ import annotations

from ivtp.core import Plan, Shape, Stage
from ivtp.core.scores import Layerwise
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import before_language


@register_pruner
def fastv(shape: Shape, keep: int, layer: int = 2) -> Plan:
    """FastV (arXiv 2403.06764): one cut after `layer` language layers, by the attention of the last prompt token.

    Scores     attention of the last prompt token in layer `layer` - 1, mean over heads
    Selects    the highest, in sequence order
    The rest   is dropped; earlier layers keep its keys and values
    Where      once, before language layer 2 (0-based)
    Budgets    192, 128, 64 of 576 (published)

    Published code: the score is the attention of the last token; the paper says the average over all tokens (code
    followed). Its positions stay the original ones, as here by default. It applies the choice of the first sample of a
    batch to all samples (a bug; here every sample has its own), and rounds a drop ratio where we count tokens.
    """
    return Plan(language=Stage(before_language(shape, "fastv", layer, keep), Layerwise()))
