"""The image as a grid: cells of patches, chosen before any image is seen."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from ivtp.pruning.tokens import Selection, Tokens


@dataclass(frozen=True)
class Cells:
    """Cuts a `rows` × `columns` grid into `keep` cells; each is a slot, at the place of its middle patch.

    merging  the other patches of a cell join it
    """

    rows: int
    columns: int
    merging: bool

    def __call__(self, scores: Tensor | None, metric: Tensor | None, keep: int, tokens: Tokens) -> Selection:
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
    first, cell = 0, []
    count = [keep // bands + (band < keep % bands) for band in range(bands)]
    starts = [sum(count[:band]) for band in range(bands)]
    for row in range(rows):
        band = row * bands // rows
        first = starts[band]
        cell += [first + column * count[band] // columns for column in range(columns)]
    return cell


def middles(cell: list[int], columns: int, keep: int) -> list[int]:
    """Of each cell the patch nearest to its middle, the first of equally near ones."""
    members: list[list[int]] = [[] for _ in range(keep)]
    for place, number in enumerate(cell):
        members[number].append(place)
    found = []
    for group in members:
        row = sum(place // columns for place in group) / len(group)
        column = sum(place % columns for place in group) / len(group)
        found.append(min(group, key=lambda p: ((p // columns - row) ** 2 + (p % columns - column) ** 2, p)))
    return found


def factors(rows: int, columns: int, keep: int) -> tuple[int, int] | None:
    """The grid of exactly `keep` cells that is most like `rows` × `columns` and fits in it; None if there is none."""
    grids = [(r, keep // r) for r in range(1, min(rows, keep) + 1) if keep % r == 0 and keep // r <= columns]
    return min(grids, key=lambda grid: _stretch(grid, rows, columns)) if grids else None


def _stretch(grid: tuple[int, int], rows: int, columns: int) -> float:
    return abs(log(grid[0] * columns / (grid[1] * rows)))
