"""Reduces: (x "b v d", size "b v", scores, selection) → (x "b k d", size "b k"), a linear map over the token axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivtp.core.choices import CutSizes, Reduce
from ivtp.core.tokens import Scalars, Selection, Vectors, flat, take

Reduced = tuple[Tensor, Tensor]
"""Tokens "b k d" and their sizes "b k"."""


@dataclass(frozen=True)
class Drop(Reduce):
    """Drop the tokens that are not selected."""

    def __call__(self, x: Vectors, size: Scalars, scores: Any, selection: Selection) -> Reduced:
        return take(x, selection.index), take(size, selection.index)


@dataclass(frozen=True)
class Fuse(Reduce):
    """Sum the other tokens, weighed by their scores, in the last slot (EViT, arXiv 2202.07800)."""

    def __call__(self, x: Vectors, size: Scalars, scores: Scalars, selection: Selection) -> Reduced:
        assert selection.into is not None
        rest = selection.into == selection.index.shape[1] - 1
        weight = scores.masked_fill(~rest, 0.0).to(x.dtype)
        fused = (x * weight[:, :, None]).sum(1, keepdim=True)
        total = size.masked_fill(~rest, 0.0).sum(1, keepdim=True)
        stays = selection.index[:, :-1]
        return torch.cat([take(x, stays), fused], 1), torch.cat([take(size, stays), total], 1)


@dataclass(frozen=True)
class Absorb(Reduce):
    """Add the mean of the tokens that join a slot to the token that stays there (VisionZip, arXiv 2412.04467)."""

    def __call__(self, x: Vectors, size: Scalars, scores: Any, selection: Selection) -> Reduced:
        assert selection.into is not None
        index, k = selection.index, selection.index.shape[1]
        into = selection.into.scatter(1, index, -1)  # a token that stays does not join itself
        count = slot_sums(torch.ones_like(size), into, k).clamp_min(1)
        mean = slot_sums(x, into, k) / count[:, :, None].to(x.dtype)
        return take(x, index) + mean, take(size, index) + slot_sums(size, into, k)


@dataclass(frozen=True)
class Combine(Reduce):
    """Fill every slot with a weighted sum of visual tokens; the selection holds the weights."""

    def __call__(self, x: Vectors, size: Scalars, scores: Any, selection: Selection) -> Reduced:
        assert selection.weight is not None
        return selection.weight.to(x.dtype) @ x, take(size, selection.index)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of the weighted sums."""
        return 2 * sizes.v * sizes.keep * sizes.width


@dataclass(frozen=True)
class Merge(Reduce):
    """Average the tokens of each slot, every token counting by its size (ToMe, arXiv 2210.09461)."""

    def __call__(self, x: Vectors, size: Scalars, scores: Any, selection: Selection) -> Reduced:
        assert selection.into is not None
        k = selection.index.shape[1]
        total = slot_sums(size, selection.into, k)
        weighted = slot_sums(x * size[:, :, None].to(x.dtype), selection.into, k)
        return weighted / total[:, :, None].to(x.dtype), total


def slot_sums(values: Tensor, into: Tensor, slots: int) -> Tensor:
    """Sum `values` "b v ..." over the tokens that end in each slot, as "b slots ..."; -1 in `into` is no slot."""
    # One slot more, for those that end in none.
    rows = flat(into.where(into >= 0, slots), slots + 1)
    sums = values.new_zeros(len(values) * (slots + 1), *values.shape[2:])
    # Whole rows along the first axis, by an expanded index: torch adds these at once, and not number by number.
    rows = rows.view(-1, *[1] * (values.ndim - 2)).expand(-1, *values.shape[2:])
    return sums.scatter_add(0, rows, values.flatten(0, 1)).unflatten(0, (len(values), -1))[:, :slots]
