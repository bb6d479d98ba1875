"""DivPrune: the most diverse subset of the projected features."""

from __future__ import annotations

from ivtp.core import Plan, Schedule, Shape, Stage
from ivtp.core.selects import Hidden, MaxMin
from ivtp.pruners import register_pruner


@register_pruner
def divprune(shape: Shape, keep: int) -> Plan:
    """DivPrune (arXiv 2503.02175): greedy max-min diversity of the visual features, without any attention.

    Scores     none
    Selects    first the token farthest from its nearest neighbour, then always the one farthest from all chosen ones
               (1 - cosine); in raster order afterwards
    The rest   is dropped
    Where      before the first language layer, on the projected features
    Budgets    192, 128, 64 of 576 in comparisons (published: 9.8 %, 56)

    Paper and code agree. Published code takes the first sample of a batch for all (a bug; here each has its own), does
    not mask chosen tokens (with fewer different features than tokens to keep it may choose one twice; here it goes on
    with the next), and lets the language model renumber positions (position_ids=renumber).
    """
    return Plan(language=Stage(Schedule.at([-1], [keep], "block"), select=MaxMin(), metric=Hidden()))
