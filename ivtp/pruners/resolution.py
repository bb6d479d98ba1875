"""Fewer tokens by lower resolution: the baselines that look at nothing."""

from __future__ import annotations

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import feature_cut
from ivtp.pruning.cost import Shape
from ivtp.pruning.grids import Cells, factors
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.reduces import merge
from ivtp.pruning.schedules import Cut


@register_pruner
def spatial_pooling(shape: Shape, keep: int) -> Plan:
    """Average pooling over a grid of cells, behind the penultimate ViT layer ("Spatial pooling" of IVTP's tables).

    A budget that is no product of two fitting numbers gives rows of cells with one cell more or less. Each pooled token
    stands where the middle patch of its cell stood.
    """
    return Plan(vision=Pruner(feature_cut(shape, keep), select=Cells(*shape.grid, merging=True), reduce=merge))


@register_pruner
def grid_stride(shape: Shape, keep: int) -> Plan:
    """The middle patch of every cell of a grid, behind the penultimate ViT layer: even spacing and nothing else."""
    return Plan(vision=Pruner(feature_cut(shape, keep), select=Cells(*shape.grid, merging=False)))


@register_pruner
def downsample(shape: Shape, keep: int) -> Plan:
    """The image is shrunk (bicubic, antialiased) until it has `keep` patches; the whole model sees no more than those.

    Position embeddings are interpolated, as the models do it for other sizes; a token stands, for the language model,
    in the middle of what it covers of the original grid. `keep` must be a product of rows and columns that fit.
    """
    if not shape.resizable:
        raise ValueError("this tower reads images at their own size; shrink them with the processor's size settings")
    rows, columns = shape.grid
    grid = factors(rows, columns, keep)
    if grid is None:
        fitting = [k for k in range(1, shape.patches) if factors(rows, columns, k)]
        near = sorted(fitting, key=lambda k: abs(k - keep))[:2]
        raise ValueError(
            f"keep={keep} is no product of at most {rows} rows and {columns} columns of patches; "
            f"the nearest budgets that are: {', '.join(map(str, sorted(near)))}"
        )
    # The tower starts with `keep` tokens; the cut before its first layer says so to whoever counts.
    cut = Pruner((Cut(-1, keep, "block"),), select=Cells(rows, columns, merging=True), reduce=merge)
    return Plan(vision=cut, image=None if grid == shape.grid else grid)
