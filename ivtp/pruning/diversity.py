"""Selects that look for tokens unlike each other. Steps are sequential; every step handles the whole batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ivtp.pruning.tokens import Selection, Tokens


def max_min(scores: Tensor | None, metric: Float[Tensor, "b v d"], keep: int, tokens: Tokens) -> Selection:
    """Greedy max-min diversity by cosine distance (DivPrune, arXiv 2503.02175), in sequence order."""
    order = max_min_order(metric, keep, tokens.of_visual(tokens.valid))
    return Selection(order.sort(dim=1).values)


def max_min_order(metric: Float[Tensor, "b v d"], keep: int, valid: Tensor | None = None) -> Int[Tensor, "b k"]:
    """The order of choice: the token farthest from its nearest neighbour, then the farthest from all chosen ones."""
    metric = metric.float()
    metric = metric / metric.norm(dim=-1, keepdim=True)
    distance = 1 - metric @ metric.transpose(1, 2)
    real = torch.ones(distance.shape[:2], dtype=torch.bool, device=metric.device) if valid is None else valid
    distance = distance.masked_fill(~real[:, :, None], torch.inf).masked_fill(~real[:, None], -torch.inf)
    # The smallest entry of a column is the token itself. Padding is -inf and never chosen before a real token.
    nearest = distance.topk(2, dim=1, largest=False).values[:, 1]
    order = nearest.argmax(1, keepdim=True)
    nearest = _row(distance, order)
    chosen = [order]
    for _ in range(keep - 1):
        nearest = nearest.scatter(1, order, -torch.inf)
        order = nearest.argmax(1, keepdim=True)
        chosen.append(order)
        nearest = torch.minimum(nearest, _row(distance, order))
    return torch.cat(chosen, 1)


def _row(values: Float[Tensor, "b v v"], index: Int[Tensor, "b 1"]) -> Float[Tensor, "b v"]:
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))[:, 0]


def _max_min_flops(v: int, width: int, **_: int) -> int:
    """All distances."""
    return 2 * v * v * width


max_min.flops = _max_min_flops


def greedy_dpp_order(
    quality: Float[Tensor, "b v"], metric: Float[Tensor, "b v d"], keep: int, valid: Tensor | None = None
) -> Int[Tensor, "b k"]:
    """The order in which greedy MAP inference picks from the determinantal process with kernel q_i cos(i, j) q_j.

    Incremental Cholesky updates (arXiv 1709.05135). A kernel of lower rank than `keep` is filled up with what is left,
    in sequence order; the published code of CDPruner runs into round-off there.
    """
    metric = metric.float()
    metric = metric / metric.norm(dim=-1, keepdim=True)
    kernel = quality[:, :, None] * (metric @ metric.transpose(1, 2)) * quality[:, None]
    left = kernel.diagonal(dim1=1, dim2=2)
    floor = 1e-6 * left  # below that, a token adds nothing but round-off
    if valid is not None:
        left = left.masked_fill(~valid, -torch.inf)
    b, v = quality.shape
    factor = kernel.new_zeros(b, keep, v)
    chosen = []
    for step in range(keep):
        left = torch.where((left > floor) | (left == -torch.inf), left, 0.0)
        pick = left.argmax(1, keepdim=True)
        chosen.append(pick)
        row = _row(kernel, pick)
        if step:
            known = factor[:, :step]
            row = row - (known.gather(2, pick[:, :, None].expand(-1, step, -1)).transpose(1, 2) @ known)[:, 0]
        pivot = left.gather(1, pick)
        row = torch.where(pivot > 0, row / pivot.clamp_min(1e-30).sqrt(), 0.0)
        factor[:, step] = row
        left = (left - row.square()).scatter(1, pick, -torch.inf)
    return torch.cat(chosen, 1)


def greedy_dpp_flops(v: int, keep: int, width: int) -> int:
    """The kernel, and the projections on what has been chosen."""
    return 2 * v * v * width + keep * (keep - 1) * v
