"""Token merging."""

from __future__ import annotations

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import grouped, vision_layers
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner, keys
from ivtp.pruning.reduces import merge
from ivtp.pruning.selects import bipartite


@register_pruner
def tome(shape: Shape, keep: int, group: int | str = 1, proportional: bool = True) -> Plan:
    """ToMe (arXiv 2210.09461): in every ViT layer the most similar keys are averaged, merged tokens weigh by size.

    The paper merges a constant r per layer; here every layer keeps the same share, as all methods do at a budget, and
    the last layer meets it exactly. One merge can halve the tokens at most.
    """
    schedule = grouped(vision_layers(shape), group, shape.patches, keep)
    return Plan(
        vision=Pruner(schedule, select=bipartite, reduce=merge, metric=keys, proportional=proportional),
    )
