"""Fewer tokens by lower resolution: baselines that do not depend on the image."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch

from ivtp.core import Plan, Schedule, Select, Selection, Shape, Stage, Tokens
from ivtp.core.reduces import Merge
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import feature_cut


@register_pruner
def spatial_pooling(shape: Shape, keep: int) -> Plan:
    """Average pooling over a grid of cells, behind the penultimate ViT layer ("Spatial pooling" of IVTP's tables).

    A budget that is no product of two fitting numbers gives rows of cells with one cell more or less; 192 = 12 × 16, 128 =
    8 × 16, 64 = 8 × 8 of 24 × 24. Each pooled token stands where the middle patch of its cell stood.
    """
    return Plan(vision=Stage(feature_cut(shape, keep), select=Cells(*shape.grid, merging=True), reduce=Merge()))


@register_pruner
def grid_stride(shape: Shape, keep: int) -> Plan:
    """The middle patch of every cell of a grid, behind the penultimate ViT layer: even spacing and nothing else."""
    return Plan(vision=Stage(feature_cut(shape, keep), select=Cells(*shape.grid, merging=False)))


@register_pruner
def downsample(shape: Shape, keep: int) -> Plan:
    """A smaller image (bicubic, antialiased) of `keep` patches; the whole model reads no more than those.

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
    # The tower starts with `keep` tokens; the cut before its first layer tells the cost and the trace.
    cut = Stage(Schedule.at([-1], [keep], "block"), select=Cells(rows, columns, merging=True), reduce=Merge())
    return Plan(vision=cut, image=None if grid == shape.grid else grid)


@dataclass(frozen=True)
class Cells(Select):
    """`keep` cells of a `rows` × `columns` grid; each is a slot, at the place of its middle patch.

    merging  the other patches of a cell join it
    """

    rows: int
    columns: int
    merging: bool

    def __call__(self, scores: None, metric: None, keep: int, tokens: Tokens) -> Selection:
        cell = cells(self.rows, self.columns, keep)
        middle = middles(cell, self.columns, keep)
        b, device = tokens.x.shape[0], tokens.x.device
        into = torch.tensor(cell, device=device).expand(b, -1) if self.merging else None
        return Selection(torch.tensor(middle, device=device).expand(b, -1), into)


def cells(rows: int, columns: int, keep: int) -> list[int]:
    """The cell of each patch: a regular grid of cells where one fits well, else bands with one cell more or less."""
    grid = factors(rows, columns, keep)
    if grid is not None and _stretch(grid, rows, columns) <= log(2):
        bands = grid[0]
    else:
        bands = max(1, min(rows, keep, round((keep * rows / columns) ** 0.5)))
        while bands * columns < keep:
            bands += 1
    count = [keep // bands + (band < keep % bands) for band in range(bands)]
    return [
        sum(count[:band]) + column * count[band] // columns
        for band in (row * bands // rows for row in range(rows))
        for column in range(columns)
    ]


def middles(cell: list[int], columns: int, keep: int) -> list[int]:
    """Patch of each cell that is nearest to its middle, the first of equally near ones."""
    members: list[list[int]] = [[] for _ in range(keep)]
    for place, number in enumerate(cell):
        members[number].append(place)
    nearest = []
    for group in members:
        row = sum(place // columns for place in group) / len(group)
        column = sum(place % columns for place in group) / len(group)
        nearest.append(min(group, key=lambda p: ((p // columns - row) ** 2 + (p % columns - column) ** 2, p)))
    return nearest


def factors(rows: int, columns: int, keep: int) -> tuple[int, int] | None:
    """The grid of exactly `keep` cells that is most like `rows` × `columns` and fits in it; None if there is none."""
    grids = [(r, keep // r) for r in range(1, min(rows, keep) + 1) if keep % r == 0 and keep // r <= columns]
    return min(grids, key=lambda grid: _stretch(grid, rows, columns)) if grids else None


def _stretch(grid: tuple[int, int], rows: int, columns: int) -> float:
    return abs(log(grid[0] * columns / (grid[1] * rows)))
