"""FasterVLM: CLS attention ranks what the projector's features are worth."""

from __future__ import annotations

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import feature_cut
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.scores import Layerwise


@register_pruner
def fastervlm(shape: Shape, keep: int) -> Plan:
    """FasterVLM (arXiv 2412.01818): the CLS attention of the penultimate ViT layer, once, before the language model.

    Scores     CLS row of the penultimate layer, mean over heads
    Selects    the highest, in raster order
    The rest   is dropped
    Where      behind the penultimate ViT layer

    Published code projects all features and masks them afterwards; a projector works on each token alone, so cutting
    before it gives the same tokens for less. Its language model sees a shorter prompt (position_ids=renumber).
    """
    return Plan(vision=Pruner(feature_cut(shape, keep), Layerwise()))
