"""Density-peaks clustering of a batch, with a different number of points and clusters per sample."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def density_peaks(
    x: Float[Tensor, "b p d"],
    clusters: Int[Tensor, " b"],
    real: Bool[Tensor, "b p"],
    noise: Float[Tensor, "b p"] | None = None,
) -> tuple[Int[Tensor, "b p"], Int[Tensor, "b p"]]:
    """Clusters around points of high density that are far from denser ones (DPC-KNN, as used by arXiv 2410.04417).

    clusters  how many per sample; so many nearest points, itself included, make a point's density
    real      which points there are
    noise     added to the density, in parts of a million: breaks ties as the published code does; None: the first wins
    Returns the points in the order in which they are centres (the first `clusters` of them are), and the cluster of
    each.
    """
    x = x.float()
    square = x.square().sum(-1)
    distance = (square[:, :, None] + square[:, None] - 2 * x @ x.transpose(1, 2)).clamp_min(0)
    eye = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    distance = distance.masked_fill(eye, 0.0).sqrt() / x.shape[2] ** 0.5
    pairs = real[:, :, None] & real[:, None]

    nearest = distance.masked_fill(~pairs, torch.inf).sort(dim=2).values
    rank = torch.arange(x.shape[1], device=x.device)
    counted = (rank < clusters[:, None, None]) & (nearest < torch.inf)
    mean = nearest.square().masked_fill(~counted, 0.0).sum(2) / clusters[:, None]
    density = (-mean).exp()
    if noise is not None:
        density = density + noise * 1e-6
    denser = (density[:, None] > density[:, :, None]) & pairs
    farthest = distance.masked_fill(~pairs, 0.0).amax((1, 2))
    parent = distance.masked_fill(~denser, torch.inf).amin(2)
    parent = torch.where(parent < torch.inf, parent, farthest[:, None])

    peak = (parent * density).masked_fill(~real, -torch.inf)
    order = peak.argsort(dim=1, descending=True, stable=True)
    to_centre = distance.gather(2, order[:, None].expand(-1, x.shape[1], -1))
    cluster = to_centre.masked_fill(rank >= clusters[:, None, None], torch.inf).argmin(2)
    # A centre belongs to itself, even where two centres are the same point.
    own = order.argsort(dim=1)
    return order, torch.where(own < clusters[:, None], own, cluster)


def density_peaks_flops(points: int, width: int) -> int:
    """All distances."""
    return 2 * points * points * width
