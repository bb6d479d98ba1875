"""Reduces: (x "b v d", size "b v", scores, selection) → (x "b k d", size "b k"), a linear map over the token axis."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ivtp.pruning.tokens import Selection, take


@runtime_checkable
class Reduce(Protocol):
    def __call__(
        self, x: Tensor, size: Tensor, scores: Tensor | None, selection: Selection
    ) -> tuple[Tensor, Tensor]: ...


def drop(
    x: Float[Tensor, "b v d"], size: Float[Tensor, "b v"], scores: Tensor | None, selection: Selection
) -> tuple[Tensor, Tensor]:
    """What is not selected is gone."""
    return take(x, selection.index), take(size, selection.index)


def fuse(
    x: Float[Tensor, "b v d"], size: Float[Tensor, "b v"], scores: Tensor | None, selection: Selection
) -> tuple[Tensor, Tensor]:
    """What is not selected is summed up, weighed by its score, in the last slot (EViT, arXiv 2202.07800)."""
    rest = selection.into == selection.index.shape[1] - 1
    weight = scores.masked_fill(~rest, 0.0).to(x.dtype)
    fused = (x * weight[:, :, None]).sum(1, keepdim=True)
    total = size.masked_fill(~rest, 0.0).sum(1, keepdim=True)
    stays = selection.index[:, :-1]
    return torch.cat([take(x, stays), fused], 1), torch.cat([take(size, stays), total], 1)


def absorb(
    x: Float[Tensor, "b v d"], size: Float[Tensor, "b v"], scores: Tensor | None, selection: Selection
) -> tuple[Tensor, Tensor]:
    """What is not selected is averaged, and the mean added to the token it joins (VisionZip, arXiv 2412.04467)."""
    index, into = selection.index, selection.into
    joins = (into >= 0).scatter(1, index, False)
    slot = into.clamp_min(0)
    count = torch.zeros_like(size[:, : index.shape[1]]).scatter_add(1, slot, joins.to(size.dtype))
    total = torch.zeros_like(x[:, : index.shape[1]]).scatter_add(
        1, slot[:, :, None].expand_as(x), x * joins[:, :, None].to(x.dtype)
    )
    sizes = take(size, index).scatter_add(1, slot, size * joins.to(size.dtype))
    return take(x, index) + total / count.clamp_min(1)[:, :, None].to(x.dtype), sizes


def combine(
    x: Float[Tensor, "b v d"], size: Float[Tensor, "b v"], scores: Tensor | None, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Every slot is the weighted sum of visual tokens that the selection spells out."""
    return selection.weight.to(x.dtype) @ x, take(size, selection.index)


def _combine_flops(v: int, keep: int, width: int, **_: int) -> int:
    return 2 * v * keep * width


combine.flops = _combine_flops


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
