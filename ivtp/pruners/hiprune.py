"""HiPrune: anchors where a middle layer looks, their neighbours, and registers where a deep layer looks."""

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
from ivtp.pruning.scores import hide_padding, propagate_flops
from ivtp.pruning.tokens import Selection, Tokens


@register_pruner
def hiprune(shape: Shape, keep: int, alpha: float = 0.1, object_layer: int | None = None) -> Plan:
    """HiPrune (arXiv 2508.00553): the attention that each token receives, in a middle ("object") and in a deep ViT
    layer.

    Scores     column means of the attention map, over all queries, the CLS among them, and over heads
    Selects    round(alpha × keep / 5) anchors by the object layer, their four neighbours, and the best of the others by
               the penultimate layer; in raster order
    The rest   is dropped
    Where      behind the penultimate ViT layer. `object_layer` counts from 0 (published: the 9th of 24; here by default
               at the same depth, 3/8 of the stack)

    Published code takes neighbours on flat indices: left and right wrap to the next row, and the outermost are clamped
    (followed; the paper speaks of four neighbours). It divides the budget by the number of images in the batch; here it
    is per image. Chosen tokens are pushed back by subtracting 1 from their deep score, which is enough where scores are
    means; where they are sums (its Qwen version) strong ones are chosen twice and fewer than `keep` tokens stay.
    """
    deep = max(0, shape.vision.depth - 2)
    shallow = max(0, min(deep, 3 * shape.vision.depth // 8 - 1)) if object_layer is None else object_layer
    if not 0 <= shallow <= deep:
        raise ValueError(f"object_layer={shallow} must be between 0 and {deep}, the layer behind which hiprune cuts")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be between 0 and 1: the share of anchors and neighbours in what stays")
    layers = (shallow, deep)
    select = AnchorsAndRegisters(alpha, shape.grid[1])
    return Plan(vision=Pruner(feature_cut(shape, keep), Received(layers, -1), select, metric=Received(layers, 0)))


@dataclass(frozen=True)
class Received:
    """The attention that each visual token gets in one of the layers read, mean over all queries and heads."""

    needs: tuple[int, ...]
    which: int

    def __call__(self, seen: list[Attention], tokens: Tokens) -> Float[Tensor, "b v"]:
        weight = tokens.valid.float()
        column = seen[self.which].propagate(weight / weight.sum(1, keepdim=True))
        return hide_padding(tokens.of_visual(column), tokens)

    def flops(self, n: int, heads: int, head_width: int, **_: int) -> int:
        return propagate_flops(n, heads, head_width)


@dataclass(frozen=True)
class AnchorsAndRegisters:
    """`metric`, the shallow score, chooses anchors, which bring neighbours; `scores`, the deep one, the others."""

    alpha: float
    columns: int

    def __call__(
        self, scores: Float[Tensor, "b v"], metric: Float[Tensor, "b v"], keep: int, tokens: Tokens
    ) -> Selection:
        b, v = scores.shape
        near = torch.zeros(b, v, dtype=torch.bool, device=scores.device)
        anchors = self.anchors(metric, keep)
        if anchors.shape[1]:
            offsets = torch.tensor([0, -1, 1, -self.columns, self.columns], device=scores.device)
            around = (anchors[:, :, None] + offsets).clamp(0, v - 1).flatten(1)
            near = near.scatter(1, around, True) & (scores > -torch.inf)
        order = (scores - near.to(scores.dtype)).argsort(dim=1, descending=True, stable=True)
        place = torch.arange(v, device=scores.device)[None]
        deep = torch.zeros_like(near).scatter(1, order, place < keep - near.sum(1, keepdim=True))
        stays = near | deep
        index = (~stays).byte().argsort(dim=1, stable=True)[:, :keep]
        return Selection(index, valid=stays.gather(1, index))

    def anchors(self, metric: Float[Tensor, "b v"], keep: int) -> Tensor:
        return metric.argsort(dim=1, descending=True, stable=True)[:, : round(keep * self.alpha / 5)]

    def flops(self, n: int, heads: int, head_width: int, **_: int) -> int:
        """The metric's map; the score counts its own."""
        return propagate_flops(n, heads, head_width)
