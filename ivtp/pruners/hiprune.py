"""HiPrune: tokens that a middle layer attends to, their neighbours, and tokens that a deep layer attends to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ivtp.core import Attention, CutSizes, Plan, Score, Select, Selection, Shape, Stage, Tokens
from ivtp.core.scores import hide_padding, propagate_flops
from ivtp.core.selects import descending
from ivtp.core.tokens import indices
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import feature_cut
from ivtp.registry import check_range


@register_pruner
def hiprune(shape: Shape, keep: int, alpha: float = 0.1, object_layer: int | None = None) -> Plan:
    """HiPrune (arXiv 2508.00553): by the attention that each token receives, in a middle ("object") and in a deep ViT layer.

    Scores     column means of the attention map, over all queries, the CLS among them, and over heads
    Selects    round(alpha × keep / 5) anchors by the object layer, their four neighbours, and the best of the others by
               the penultimate layer; in raster order
    The rest   is dropped
    Where      behind the penultimate ViT layer. `object_layer` counts from 0 (published: the 9th of 24; here by default
               at the same depth, 3/8 of the stack)
    Budgets    192, 128, 64 of 576 (published), with position_ids=renumber

    Published code takes neighbours on flat indices: left and right wrap to the next row, and the outermost are clamped
    (followed; the paper speaks of four neighbours). It divides the budget by the number of images in the batch; here it
    is per image. Chosen tokens are pushed back by subtracting 1 from their deep score, which is enough where scores are
    means; where they are sums (its Qwen version) strong ones are chosen twice and fewer than `keep` tokens stay.
    """
    deep = max(0, shape.vision.depth - 2)
    shallow = max(0, min(deep, 3 * shape.vision.depth // 8 - 1)) if object_layer is None else object_layer
    check_range("object_layer", shallow, 0, deep, ", the layer behind which hiprune cuts")
    check_range("alpha", alpha, 0, 1, ": the share of anchors and neighbours in what stays")
    layers = (shallow, deep)
    select = AnchorsAndRegisters(alpha, shape.grid[1])
    return Plan(vision=Stage(feature_cut(shape, keep), Received(layers, -1), select, metric=Received(layers, 0)))


@dataclass(frozen=True)
class Received(Score):
    """The attention that each visual token receives in one of the layers read, mean over all queries and heads."""

    needs: str | tuple[int, ...] = field()
    which: int

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Tensor:
        weight = tokens.valid.float()
        column = attentions[self.which].propagate(weight / weight.sum(1, keepdim=True))
        return hide_padding(tokens.of_visual(column), tokens)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of one product of a vector with the map."""
        return propagate_flops(sizes.n, sizes.heads, sizes.head_width)


@dataclass(frozen=True)
class AnchorsAndRegisters(Select):
    """`metric`, the shallow score, chooses anchors, which bring neighbours; `scores`, the deep one, the others."""

    alpha: float
    columns: int

    def __call__(self, scores: Tensor, metric: Tensor, keep: int, tokens: Tokens) -> Selection:
        b, v = scores.shape
        near = torch.zeros(b, v, dtype=torch.bool, device=scores.device)
        anchors = self.anchors(metric, keep)
        if anchors.shape[1]:
            offsets = torch.tensor([0, -1, 1, -self.columns, self.columns], device=scores.device)
            around = (anchors[:, :, None] + offsets).clamp(0, v - 1).flatten(1)
            near = near.scatter(1, around, True) & (scores > -torch.inf)
        order = descending(scores - near.to(scores.dtype))
        place = torch.arange(v, device=scores.device)[None]
        deep = torch.zeros_like(near).scatter(1, order, place < keep - near.sum(1, keepdim=True))
        stays = near | deep
        index = indices(stays, keep)
        return Selection(index, valid=stays.gather(1, index))

    def anchors(self, metric: Tensor, keep: int) -> Tensor:
        """Indices of the anchors."""
        return descending(metric)[:, : round(keep * self.alpha / 5)]
