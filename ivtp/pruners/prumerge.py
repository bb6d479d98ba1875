"""LLaVA-PruMerge and PruMerge+: attended tokens stay, each takes in its neighbours, one more takes in the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import feature_cut
from ivtp.pruning.attention import Attention
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.reduces import combine
from ivtp.pruning.scores import hide_padding, reference_flops, reference_row
from ivtp.pruning.tokens import Selection, Tokens, take


@register_pruner
def prumerge(shape: Shape, keep: int, adaptive: bool = False, neighbours: int = 32) -> Plan:
    """LLaVA-PruMerge (arXiv 2403.15388): the most attended tokens are cluster centres, all others are merged.

    Scores     the CLS row of the last ViT layer, q and k of all heads taken as one head
    Selects    the highest, in descending order; `adaptive`: as many as stand out (above q3 + 1.5 (q3 - q1)), at most
               `keep` - 1, a different number per image
    The rest   every centre adds its 32 neighbours (by keys, centres among them), weighed by their attention; a last
               token, which `keep` counts, is the weighted sum of all tokens that are no centres
    Where      behind the penultimate ViT layer, whose output the projector reads

    Published code: attention of the last layer as one wide head (the paper says penultimate layer); the weighted sum is
    added to the centre, not averaged; the extra token is not in the paper (code followed). Its adaptive ratio pools
    the quartiles over the batch; here every image has its own. A merged token stands where its centre stood, the extra
    one where its strongest part stood; the language model reads them in raster order.
    """
    return _plan(shape, keep, Clusters(adaptive, False, neighbours))


@register_pruner
def prumerge_plus(shape: Shape, keep: int, adaptive: bool = False, neighbours: int = 32) -> Plan:
    """PruMerge+ (arXiv 2403.15388): PruMerge with evenly spaced centres beside the attended ones.

    `adaptive` is the published rule: every third of a step of 1/ratio, where the attended ones leave room (about three
    more per attended one), at most `keep` - 1 centres. At a fixed budget half of the centres are attended and half
    evenly spaced, as in its training code, which counts a token twice when both choose it; here the next attended one
    steps in. Everything else as `prumerge`; the released code knows 576 tokens only.
    """
    return _plan(shape, keep, Clusters(adaptive, True, neighbours))


def _plan(shape: Shape, keep: int, select: Clusters) -> Plan:
    if keep < 2:
        raise ValueError(f"keep={keep}: prumerge needs at least 2 tokens, one of them for the merged rest")
    if shape.vision.depth < 2:
        raise ValueError(f"prumerge reads the last two ViT layers, but there is {shape.vision.depth}")
    if shape.unit > 1:
        raise ValueError(
            f"prumerge compares the keys of single patches, but this tower cuts the {shape.unit} patches of a unit together"
        )
    return Plan(vision=Pruner(feature_cut(shape, keep), OneHead(), select, combine, metric=wide_keys))


@dataclass(frozen=True)
class OneHead:
    """The reference's row with the heads joined to one, `softmax(q kᵀ / √(all widths))`, raw probabilities."""

    needs = "next"

    def __call__(self, seen: list[Attention], tokens: Tokens) -> Float[Tensor, "b v"]:
        q, k, v = (t.transpose(1, 2).flatten(2)[:, None] for t in (seen[-1].q, seen[-1].k, seen[-1].v))
        wide = Attention(q, k, v, q.shape[-1] ** -0.5, seen[-1].bias)
        return hide_padding(tokens.of_visual(reference_row(wide, tokens)), tokens)

    def flops(self, n: int, heads: int, head_width: int, referring: int = 1, **_: int) -> int:
        return reference_flops(n, 1, heads * head_width, referring)


def wide_keys(seen: list[Attention], tokens: Tokens) -> Float[Tensor, "b v e"]:
    """Keys of all heads, concatenated."""
    return tokens.of_visual(seen[-1].k.transpose(1, 2).flatten(2).float())


wide_keys.needs = "next"


@dataclass(frozen=True)
class Clusters:
    """`keep` - 1 centres with their neighbours, and a last token for what is no centre."""

    adaptive: bool
    spaced: bool
    neighbours: int = 32

    def __call__(
        self, scores: Float[Tensor, "b v"], metric: Float[Tensor, "b v e"], keep: int, tokens: Tokens
    ) -> Selection:
        valid = tokens.of_visual(tokens.valid)
        centres, count = self.centres(scores, valid, keep - 1)
        slot = torch.arange(keep, device=scores.device)[None]
        real = slot < count[:, None]
        weight = scores.masked_fill(~valid, 0.0)
        is_centre = torch.zeros_like(scores).scatter_add(1, centres, real[:, :-1].float()) > 0

        rows = torch.zeros(*scores.shape[:1], keep, scores.shape[1], device=scores.device)
        near = self.nearest(metric, centres, valid)
        rows[:, :-1].scatter_(2, near, weight[:, None].expand(-1, keep - 1, -1).gather(2, near))
        rows[:, :-1].scatter_(2, centres[:, :, None], 1.0)
        rest = weight.masked_fill(is_centre, 0.0)
        rows = torch.where(real[:, :, None], rows, 0.0)
        rows = torch.where((slot == count[:, None])[:, :, None], rest[:, None], rows)

        strongest = scores.masked_fill(is_centre, -torch.inf).argmax(1, keepdim=True)
        index = torch.where(real, torch.cat([centres, strongest], 1), strongest)
        return Selection(index, valid=slot <= count[:, None] if self.adaptive else None, weight=rows)

    def centres(self, scores: Tensor, valid: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Which tokens are centres "b room", and how many of them per sample."""
        order = scores.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        v = scores.shape[1]
        place = torch.arange(v, device=scores.device)[None]
        if self.adaptive:
            top = (v * outlier_share(scores, valid)).long().clamp_min(1)[:, None]
        else:
            top = torch.full_like(order[:, :1], room - room // 2 if self.spaced else room)
        first = rank < top
        spaced = torch.zeros_like(first)
        if self.spaced and self.adaptive:
            step = (1 / (top / v).double()).long() if self.adaptive else None
            spaced = (place % (step // 3).clamp_min(1) == 0) & (place < v - 1)
        elif self.spaced and room // 2:
            at = (torch.arange(room // 2, device=scores.device) + 0.5) * v / (room // 2)
            spaced = spaced.index_fill(1, at.long(), True)
        key = torch.where(first, rank, torch.where(spaced & valid, v + place, 2 * v + rank))
        count = (key < 2 * v).sum(1) if self.adaptive else torch.full_like(top[:, 0], room)
        return key.argsort(dim=1)[:, :room], count.clamp_max(room)

    def nearest(self, metric: Tensor, centres: Tensor, valid: Tensor) -> Tensor:
        """The most similar other tokens of every centre, the most similar first."""
        metric = metric / metric.norm(dim=-1, keepdim=True)
        similarity = take(metric, centres) @ metric.transpose(1, 2)
        similarity = similarity.masked_fill(~valid[:, None], -2.0).scatter(2, centres[:, :, None], -3.0)
        return similarity.topk(min(self.neighbours, metric.shape[1] - 1), dim=2).indices

    def flops(self, v: int, keep: int, heads: int, head_width: int, **_: int) -> int:
        return 2 * (keep - 1) * v * heads * head_width


def outlier_share(scores: Float[Tensor, "b v"], valid: Tensor) -> Float[Tensor, " b"]:
    """The share of scores above q3 + 1.5 (q3 - q1), in float64."""
    known = scores.masked_fill(~valid, torch.nan)
    q1, q3 = (torch.nanquantile(known, q, dim=1, keepdim=True) for q in (0.25, 0.75))
    return (known > q3 + 1.5 * (q3 - q1)).sum(1).double() / valid.sum(1)
