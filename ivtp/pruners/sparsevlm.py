"""SparseVLM: the prompt's visual words rate the image tokens; what is dropped is partly recycled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ivtp.core import (
    Attention,
    CutSizes,
    Metric,
    Plan,
    Reduce,
    Schedule,
    Score,
    Select,
    Selection,
    Shape,
    Stage,
    Tokens,
)
from ivtp.core.reduces import Drop, slot_sums
from ivtp.core.schedule import equal_ratio
from ivtp.core.scores import hide_padding, row_flops
from ivtp.core.selects import descending
from ivtp.core.tokens import indices, take
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import language_depth, listed_layers
from ivtp.registry import check_choice

TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Published: image tokens kept at the three cuts, besides recycled ones, for an average budget of 576 tokens."""
SCHEDULES = ("ratio", "published")
Count = TypeVar("Count", int, Tensor)


@register_pruner
def sparsevlm(
    shape: Shape,
    keep: int,
    schedule: str = "ratio",
    recycle: bool = True,
    rank: bool = False,
    scale: float = 13.5,
    bias: float = 0.0,
    layers: Sequence[int] | None = None,
) -> Plan:
    """SparseVLM (arXiv 2410.04417): text tokens that resemble the image rate its tokens in the language model.

    Scores     attention of the raters in the current layer, mean over heads and raters; raters are the prompt's tokens
               behind the image with more than the average share in softmax(image · textᵀ) of the input embeddings
    Selects    the highest, in sequence order
    The rest   `recycle`: the best 30 % of it are clustered, about ten to a cluster, and the means stand behind the kept
               ones; the others are dropped
    Where      after three language layers (2, 6, 15 of 32; other stacks at the same depth)

    `keep` counts everything that is left after the last cut, recycled tokens included, with the same share kept at
    every cut; `schedule="published"` takes the published tables instead (576 tokens; `keep` is then their average: 192,
    128, 96 or 64). `rank`: at each cut at most int(rank of the raters' map × `scale` + `bias`) stay, a different number
    per image.

    Published code: the rank rule of the paper is in its first release only, with a scale instead of the paper's
    (tokens - rank); later versions have the tables. Cluster means are divided by count + 1e-6 (followed). Positions
    are renumbered there: position_ids=renumber. It adds noise to break ties of density; here the first wins. Batch 1
    only.
    """
    depth = language_depth(shape, "sparsevlm")
    check_choice("schedule", schedule, SCHEDULES)
    if layers is None:
        layers = sorted({max(1, round(depth * after / 32)) - 1 for after in (3, 7, 16)})
    layers = listed_layers(layers, 0, depth - 1)
    if schedule == "published":
        if keep not in TABLES or shape.patches != 576 or len(layers) != 3:
            raise ValueError(
                f"keep={keep} of {shape.patches} tokens in {len(layers)} cuts has no published table; there are "
                f"tables for {', '.join(map(str, sorted(TABLES)))} of 576 tokens in 3 cuts; or use schedule=ratio"
            )
        counts = _totals(shape.patches, TABLES[keep], recycle)
    else:
        counts = equal_ratio(shape.patches, keep, len(layers))
    before = shape.patches
    for layer, count in zip(layers, counts, strict=True):
        least = 1 + (recycled(before - 1)[1] if recycle and before > 1 else 0)
        if count < min(least, before):
            raise ValueError(
                f"keep={keep}: {before} → {count} tokens at language layer {layer}, but recycling alone makes "
                f"{least - 1}; keep at least {least} there, or set recycle=false"
            )
        before = count
    stage = Stage(
        Schedule.at(layers, counts, "block"),
        RaterAttention(),
        Rated(recycle, rank, scale, bias),
        ClusterMeans() if recycle else Drop(),
        metric=RaterRows() if rank else None,
    )
    return Plan(language=stage, reference="raters")


def recycled(dropped: Count) -> tuple[Count, Count]:
    """Number of dropped tokens that are recycled (30 %), and of their clusters."""
    points = dropped * 3 // 10 + 1
    return points, points // 10 + 1


def kept_of(total: int, tokens: int) -> int:
    """Number of tokens that stay as they are so that, with the clusters of the others, `total` are left."""
    return max(kept for kept in range(tokens) if kept + recycled(tokens - kept)[1] <= total)


def _totals(tokens: int, kept: Sequence[int], recycle: bool) -> list[int]:
    totals = []
    for count in kept:
        count = min(count, tokens - 1)
        tokens = count + (recycled(tokens - count)[1] if recycle else 0)
        totals.append(tokens)
    return totals


def text_rows(attention: Attention, tokens: Tokens) -> tuple[Float[Tensor, "b t v"], Float[Tensor, "b t"]]:
    """Attention of every text token to the visual ones, and which of the text tokens are raters, as 0 and 1."""
    place = tokens.other_index
    rows = attention.rows(place)
    index = tokens.visual_index[:, None].expand(-1, place.shape[1], -1)
    return rows.gather(2, index), take((tokens.reference & tokens.valid).float(), place)


@dataclass(frozen=True)
class RaterRows(Metric):
    """The raters' part of the map "b t v"; other rows, and padding, are zero."""

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Tensor:
        rows, raters = text_rows(attentions[-1], tokens)
        return rows * raters[:, :, None] * tokens.of_visual(tokens.valid)[:, None]

    def flops(self, sizes: CutSizes) -> int:
        return (sizes.n - sizes.v) * row_flops(sizes.n, sizes.heads, sizes.head_width)


@dataclass(frozen=True)
class RaterAttention(Score):
    """Attention of the raters, mean over them."""

    needs = "last"

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Tensor:
        rows, raters = text_rows(attentions[-1], tokens)
        relation = (rows * raters[:, :, None]).sum(1) / raters.sum(1, keepdim=True).clamp_min(1)
        return hide_padding(relation, tokens)

    def flops(self, sizes: CutSizes) -> int:
        return (sizes.n - sizes.v) * row_flops(sizes.n, sizes.heads, sizes.head_width)


def rank_of(rows: Float[Tensor, "b t v"]) -> Int[Tensor, " b"]:
    """The rank of each map, with the default tolerance for its rows and columns that are not all zero."""
    sides = torch.stack([(rows != 0).any(2).sum(1), (rows != 0).any(1).sum(1)]).amax(0)
    return torch.linalg.matrix_rank(rows, rtol=sides * torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Rated(Select):
    """The highest scores, then clusters of the best of the others; with `rank`, fewer where the raters' map has a low
    rank.

    noise  see `density_peaks`
    """

    recycle: bool = True
    rank: bool = False
    scale: float = 13.5
    bias: float = 0.0
    noise: Tensor | None = None

    def __call__(self, scores: Tensor, metric: Any, keep: int, tokens: Tokens) -> Selection:
        v = scores.shape[1]
        there = tokens.of_visual(tokens.valid).sum(1)
        kept = torch.full_like(there, kept_of(keep, v) if self.recycle else keep)
        if self.rank:
            kept = kept.minimum((rank_of(metric) * self.scale + self.bias).long())
        kept = kept.minimum(there - 1).clamp_min(1)
        return self.select(scores, kept, keep, tokens, there)

    def select(self, scores: Tensor, kept: Tensor, slots: int, tokens: Tokens, there: Tensor) -> Selection:
        """Keep `kept` "b" tokens and clusters of the others, in `slots` places."""
        b, v = scores.shape
        order = descending(scores)
        rank = order.argsort(dim=1)
        stays = rank < kept[:, None]
        slot = torch.arange(slots, device=scores.device)[None]
        index = indices(stays, slots)
        into = torch.where(stays, stays.long().cumsum(1) - 1, -1)
        if not self.recycle:
            return Selection(index, valid=slot < kept[:, None])

        points, clusters = recycled((there - kept).clamp_min(0))
        points = points.minimum(there - kept)
        clusters = clusters.minimum(points)
        width = min(v, recycled(v)[0])  # no sample recycles more
        number = torch.arange(width, device=scores.device)[None]
        place = order.gather(1, (kept[:, None] + number).clamp_max(v - 1))
        x = take(tokens.of_visual(tokens.x), place)
        centres, cluster = density_peaks(x, clusters, number < points[:, None], self.noise)
        joins = kept[:, None] + cluster
        # Places beyond the recycled ones repeat the last token; they must not overwrite it.
        spare = torch.full((b, v + 1), -1, dtype=torch.long, device=scores.device)
        spare[:, :v] = into
        into = spare.scatter(1, torch.where(number < points[:, None], place, v), joins)[:, :v]
        middle = place.gather(1, centres)
        behind = (slot - kept[:, None]).clamp(0, width - 1)
        index = torch.where(slot < kept[:, None], index, middle.gather(1, behind))
        return Selection(index, into, slot < (kept + clusters)[:, None])

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of all distances between recycled tokens."""
        points = min(sizes.v, recycled(sizes.v)[0])
        return 2 * points * points * sizes.width if self.recycle else 0


@dataclass(frozen=True)
class ClusterMeans(Reduce):
    """The mean of the tokens that join each slot, divided by count + 1e-6 where several do; others are dropped."""

    def __call__(self, x: Tensor, size: Tensor, scores: Any, selection: Selection) -> tuple[Tensor, Tensor]:
        assert selection.into is not None
        into, k = selection.into, selection.index.shape[1]
        count = slot_sums(torch.ones_like(x[:, :, 0]), into, k)
        mean = slot_sums(x, into, k) / (count + 1e-6)[:, :, None]
        alone = (count == 1)[:, :, None]
        return torch.where(alone, take(x, selection.index), mean), slot_sums(size, into, k).clamp_min(1)


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
