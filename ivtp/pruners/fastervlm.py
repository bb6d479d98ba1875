"""FasterVLM: CLS attention ranks the features that the projector reads."""

from __future__ import annotations

from ivtp.core import Plan, Shape, Stage
from ivtp.core.scores import Layerwise
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import feature_cut


@register_pruner
def fastervlm(shape: Shape, keep: int) -> Plan:
    """FasterVLM (arXiv 2412.01818): the CLS attention of the penultimate ViT layer, once, before the language model.

    Scores     CLS row of the penultimate layer, mean over heads
    Selects    the highest, in raster order
    The rest   is dropped
    Where      behind the penultimate ViT layer
    Budgets    192, 128, 64 of 576 (published)

    Published code projects all features and masks them afterwards; a projector works on each token alone, so cutting
    before it gives the same tokens for less. Its language model reads a shorter prompt (position_ids=renumber).
    """
    return Plan(vision=Stage(feature_cut(shape, keep), Layerwise()))
