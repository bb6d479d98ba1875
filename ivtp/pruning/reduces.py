"""Reduces: (x "b v d", size "b v", scores, selection) → (x "b k d", size "b k"), a linear map over the token axis."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ivtp.pruning.tokens import Selection, take


class Reduce(Protocol):
    def __call__(
        self, x: Tensor, size: Tensor, scores: Tensor | None, selection: Selection
    ) -> tuple[Tensor, Tensor]: ...


def drop(
    x: Float[Tensor, "b v d"], size: Float[Tensor, "b v"], scores: Tensor | None, selection: Selection
) -> tuple[Tensor, Tensor]:
    """What is not selected is gone."""
    return take(x, selection.index), take(size, selection.index)


def merge(
    x: Float[Tensor, "b v d"], size: Float[Tensor, "b v"], scores: Tensor | None, selection: Selection
) -> tuple[Tensor, Tensor]:
    """What is not selected is averaged into the slot it joins, every token counting by its size (arXiv 2210.09461)."""
    b, k = selection.index.shape
    into = selection.into
    total = torch.zeros(b, k, dtype=size.dtype, device=size.device).scatter_add(1, into, size)
    weighted = torch.zeros(b, k, x.shape[2], dtype=x.dtype, device=x.device).scatter_add(
        1, into[:, :, None].expand_as(x), x * size[:, :, None].to(x.dtype)
    )
    return weighted / total[:, :, None].to(x.dtype), total
