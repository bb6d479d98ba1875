"""SparseVLM: the prompt's visual words rate the image tokens; what is dropped is partly recycled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import language_depth, listed_layers
from ivtp.pruning.attention import Attention
from ivtp.pruning.clusters import density_peaks, density_peaks_flops
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.reduces import drop
from ivtp.pruning.schedules import Cut, equal_ratio
from ivtp.pruning.scores import hide_padding, row_flops
from ivtp.pruning.tokens import Selection, Tokens, take

TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Published: image tokens kept at the three cuts, besides recycled ones, for an average budget of 576 tokens."""
SCHEDULES = ("ratio", "published")


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
    """SparseVLM (arXiv 2410.04417): text tokens that look like the image rate its tokens in the language model.

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
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
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
    cuts = [Cut(layer, count, "block") for layer, count in zip(layers, counts, strict=True)]
    select = Rated(recycle, rank, scale, bias)
    reduce = cluster_means if recycle else drop
    pruner = Pruner(tuple(cuts), RatersLook(), select, reduce, metric=rater_rows if rank else None)
    return Plan(language=pruner, reference="raters")


def recycled(dropped: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """How many of the dropped tokens are recycled, and into how many clusters."""
    if isinstance(dropped, Tensor):
        points = (dropped.double() * 0.3).long() + 1
        return points, points // 10 + 1
    points = int(dropped * 0.3) + 1
    return points, points // 10 + 1


def kept_of(total: int, tokens: int) -> int:
    """How many of the tokens stay as they are so that, with the clusters of the others, `total` are left."""
    return max(kept for kept in range(tokens) if kept + recycled(tokens - kept)[1] <= total)


def _totals(tokens: int, kept: Sequence[int], recycle: bool) -> list[int]:
    totals = []
    for count in kept:
        count = min(count, tokens - 1)
        tokens = count + (recycled(tokens - count)[1] if recycle else 0)
        totals.append(tokens)
    return totals


def text_rows(seen: list[Attention], tokens: Tokens) -> tuple[Float[Tensor, "b t v"], Float[Tensor, "b t"]]:
    """What every text token looks at in the image, and which of them are raters, as 0 and 1."""
    place = tokens.visual.byte().argsort(dim=1, stable=True)[:, : tokens.visual.shape[1] - tokens.visual_count]
    rows = seen[-1].rows(place)
    index = tokens.visual_index[:, None].expand(-1, place.shape[1], -1)
    return rows.gather(2, index), take((tokens.reference & tokens.valid).float(), place)


def rater_rows(seen: list[Attention], tokens: Tokens) -> Float[Tensor, "b t v"]:
    """The raters' part of the map; other rows, and padding, are zero."""
    rows, raters = text_rows(seen, tokens)
    return rows * raters[:, :, None] * tokens.of_visual(tokens.valid)[:, None]


@dataclass(frozen=True)
class RatersLook:
    """The attention of the referring text tokens, mean over them."""

    needs = "last"

    def __call__(self, seen: list[Attention], tokens: Tokens) -> Float[Tensor, "b v"]:
        rows, raters = text_rows(seen, tokens)
        relation = (rows * raters[:, :, None]).sum(1) / raters.sum(1, keepdim=True).clamp_min(1)
        return hide_padding(relation, tokens)

    def flops(self, n: int, v: int, heads: int, head_width: int, **_: int) -> int:
        return (n - v) * row_flops(n, heads, head_width)


def rank_of(rows: Float[Tensor, "b t v"]) -> Int[Tensor, " b"]:
    """The rank of each map as `torch.linalg.matrix_rank` finds it in the rows and columns that are not all zero."""
    singular = torch.linalg.svdvals(rows)
    sides = torch.stack([(rows != 0).any(2).sum(1), (rows != 0).any(1).sum(1)]).amax(0)
    tolerance = singular.amax(1) * sides * torch.finfo(torch.float32).eps
    return (singular > tolerance[:, None]).sum(1)


@dataclass(frozen=True)
class Rated:
    """The highest scores, then clusters of the best of the others; with `rank`, fewer where the raters' map has a low
    rank.

    noise  see `density_peaks`
    """

    recycle: bool = True
    rank: bool = False
    scale: float = 13.5
    bias: float = 0.0
    noise: Tensor | None = None

    def __call__(
        self, scores: Float[Tensor, "b v"], metric: Float[Tensor, "b t v"] | None, keep: int, tokens: Tokens
    ) -> Selection:
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
        order = scores.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        stays = rank < kept[:, None]
        slot = torch.arange(slots, device=scores.device)[None]
        index = (~stays).byte().argsort(dim=1, stable=True)[:, :slots]  # kept ones first, in sequence order
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

    def flops(self, n: int, v: int, heads: int, head_width: int, width: int, **_: int) -> int:
        total = (n - v) * row_flops(n, heads, head_width) if self.rank else 0
        return total + (density_peaks_flops(min(v, recycled(v)[0]), width) if self.recycle else 0)


def cluster_means(
    x: Float[Tensor, "b v d"], size: Float[Tensor, "b v"], scores: Tensor | None, selection: Selection
) -> tuple[Tensor, Tensor]:
    """The mean of what joins each slot, a trifle less where several do; what joins none is gone."""
    index, into = selection.index, selection.into
    joins = (into >= 0).to(x.dtype)
    slot = into.clamp_min(0)
    empty = torch.zeros_like(x[:, : index.shape[1]])
    count = empty[:, :, 0].scatter_add(1, slot, joins)
    total = empty.scatter_add(1, slot[:, :, None].expand_as(x), x * joins[:, :, None])
    sizes = torch.zeros_like(size[:, : index.shape[1]]).scatter_add(1, slot, size * joins.to(size.dtype))
    mean = total / (count + 1e-6)[:, :, None]
    return torch.where(count[:, :, None] == 1, take(x, index), mean), sizes.clamp_min(1)
