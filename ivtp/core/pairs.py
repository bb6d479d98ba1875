"""Cosines of all pairs of vectors, without an n × n map where the map would be large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from ivtp.core.tokens import Vectors, take

WHOLE = 4096
"""Vectors of which one map is formed (64 MiB); of more, rows are computed when they are read."""
ROWS = 256
"""Rows computed at a time."""


@dataclass(frozen=True)
class Pairs:
    """Cosines of all pairs of a sample's vectors, float32.

    unit  the vectors at length one "b v d"
    map   all cosines "b v v", or None where rows are computed
    """

    unit: Float[Tensor, "b v d"]
    map: Float[Tensor, "b v v"] | None

    @classmethod
    def of(cls, vectors: Vectors) -> Pairs:
        """The pairs of these vectors."""
        unit = normalize(vectors.float(), dim=-1)
        return cls(unit, unit @ unit.transpose(1, 2) if unit.shape[1] <= WHOLE else None)

    def rows(self, index: Int[Tensor, "b k"]) -> Float[Tensor, "b k v"]:
        """The cosines of the vectors at `index` with all vectors."""
        return take(self.unit, index) @ self.unit.transpose(1, 2) if self.map is None else take(self.map, index)

    def rows_of(self, sample: Int[Tensor, " r"], index: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """The cosines of one vector at a time; `sample`, in ascending order, and `index` say which."""
        if self.map is not None:
            return self.map[sample, index]
        counts = torch.bincount(sample, minlength=len(self.unit)).tolist()
        each = zip(self.unit, index.split(counts), strict=True)
        return torch.cat([unit[own] @ unit.T for unit, own in each])

    def blocks(self) -> Iterator[tuple[slice, Float[Tensor, "b r v"]]]:
        """All rows in order: at once, or some at a time."""
        v = self.unit.shape[1]
        if self.map is not None:
            yield slice(0, v), self.map
            return
        for start in range(0, v, ROWS):
            some = slice(start, min(v, start + ROWS))
            yield some, self.unit[:, some] @ self.unit.transpose(1, 2)

    def diagonal(self) -> Float[Tensor, "b v"]:
        """The cosine of every vector with itself."""
        return self.unit.square().sum(2) if self.map is None else self.map.diagonal(dim1=1, dim2=2)


def pair_flops(v: int, width: int, passes: int, rows: int) -> int:
    """FLOPs of `passes` through all blocks and of `rows` single rows, or of the one map."""
    return 2 * v * width * (v if v <= WHOLE else passes * v + rows)
