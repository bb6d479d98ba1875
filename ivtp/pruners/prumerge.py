"""LLaVA-PruMerge and PruMerge+: attended tokens stay, each takes in its neighbours, one more takes in the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ivtp.core import Attention, CutSizes, Metric, Plan, Score, Select, Selection, Shape, Stage, Tokens
from ivtp.core.reduces import Combine
from ivtp.core.scores import hide_padding, reference_flops, reference_row
from ivtp.core.selects import cosines, descending
from ivtp.core.tokens import take
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import feature_cut


@register_pruner
def prumerge(shape: Shape, keep: int, adaptive: bool = False, neighbours: int = 32) -> Plan:
    """LLaVA-PruMerge (arXiv 2403.15388): the most attended tokens are cluster centres, all others are merged.

    Scores     the CLS row of the last ViT layer, q and k of all heads taken as one head
    Selects    the highest, in descending order; `adaptive`: as many as stand out (above q3 + 1.5 (q3 - q1)), at most
               `keep` - 1, a different number per image
    The rest   every centre adds its 32 neighbours (by keys, centres among them), weighed by their attention; a last
               token, which `keep` counts, is the weighted sum of all tokens that are no centres
    Where      behind the penultimate ViT layer, whose output the projector reads
    Budgets    adaptive, about 32 of 576 (published); fixed ones of 192, 128, 64 in comparisons

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
    steps in. Everything else as `prumerge`; the released code knows 576 tokens only. Published: about 144 of 576.
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
    return Plan(vision=Stage(feature_cut(shape, keep), OneHead(), select, Combine(), metric=WideKeys()))


@dataclass(frozen=True)
class OneHead(Score):
    """The reference's row with the heads joined to one, `softmax(q kᵀ / √(all widths))`, raw probabilities."""

    needs = "next"

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Tensor:
        last = attentions[-1]
        q, k, v = (heads.transpose(1, 2).flatten(2)[:, None] for heads in (last.q, last.k, last.v))
        wide = Attention(q, k, v, q.shape[-1] ** -0.5, last.bias)
        return hide_padding(tokens.of_visual(reference_row(wide, tokens)), tokens)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of one reference row of the wide head."""
        return reference_flops(replace(sizes, heads=1, head_width=sizes.heads * sizes.head_width))


@dataclass(frozen=True)
class WideKeys(Metric):
    """Keys of all heads, concatenated."""

    needs = "next"

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Tensor:
        return tokens.of_visual(attentions[-1].k.transpose(1, 2).flatten(2).float())


@dataclass(frozen=True)
class Clusters(Select):
    """`keep` - 1 centres with their neighbours, and a last token for what is no centre."""

    adaptive: bool
    spaced: bool
    neighbours: int = 32

    def __call__(self, scores: Tensor, metric: Tensor, keep: int, tokens: Tokens) -> Selection:
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
        """Indices of the centres "b room", and their number per sample."""
        order = descending(scores)
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
            step = (1 / (top / v).double()).long()
            spaced = (place % (step // 3).clamp_min(1) == 0) & (place < v - 1)
        elif self.spaced and room // 2:
            at = (torch.arange(room // 2, device=scores.device) + 0.5) * v / (room // 2)
            spaced = spaced.index_fill(1, at.long(), True)
        key = torch.where(first, rank, torch.where(spaced & valid, v + place, 2 * v + rank))
        count = (key < 2 * v).sum(1) if self.adaptive else torch.full_like(top[:, 0], room)
        return key.argsort(dim=1)[:, :room], count.clamp_max(room)

    def nearest(self, metric: Tensor, centres: Tensor, valid: Tensor) -> Tensor:
        """The most similar other tokens of every centre, the most similar first."""
        similarity = cosines(take(metric, centres), metric).masked_fill(~valid[:, None], -2.0)
        similarity = similarity.scatter(2, centres[:, :, None], -3.0)
        return similarity.topk(min(self.neighbours, metric.shape[1] - 1), dim=2).indices

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of the cosines with the centres."""
        return 2 * (sizes.keep - 1) * sizes.v * sizes.heads * sizes.head_width


def outlier_share(scores: Tensor, valid: Tensor) -> Tensor:
    """Share of the scores "b v" above q3 + 1.5 (q3 - q1), "b", in float64."""
    known = scores.masked_fill(~valid, torch.nan)
    q1, q3 = (torch.nanquantile(known, q, dim=1, keepdim=True) for q in (0.25, 0.75))
    return (known > q3 + 1.5 * (q3 - q1)).sum(1).double() / valid.sum(1)
