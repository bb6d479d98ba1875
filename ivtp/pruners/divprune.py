"""DivPrune: the most diverse subset of the projected features."""

from __future__ import annotations

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import language_depth
from ivtp.pruning.cost import Shape
from ivtp.pruning.diversity import max_min
from ivtp.pruning.pruner import Plan, Pruner, hidden
from ivtp.pruning.schedules import Cut


@register_pruner
def divprune(shape: Shape, keep: int) -> Plan:
    """DivPrune (arXiv 2503.02175): greedy max-min diversity of the visual features, without any attention.

    Scores     none
    Selects    first the token farthest from its nearest neighbour, then always the one farthest from all chosen ones
               (1 - cosine); in raster order afterwards
    The rest   is dropped
    Where      before the first language layer, on the projected features

    Paper and code agree. Published code takes the first sample of a batch for all (a bug; here each has its own), does
    not mask chosen tokens (with fewer different features than tokens to keep it may choose one twice; here it goes on
    with the next), and lets the language model renumber positions (position_ids=renumber).
    """
    language_depth(shape, "divprune")
    return Plan(language=Pruner((Cut(-1, keep, "block"),), select=max_min, metric=hidden))
