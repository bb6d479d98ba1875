"""VScan: a global and a local scan in the ViT with merging, one more cut in the middle of the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import feature_cut, language_depth
from ivtp.pruning.attention import Attention
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner, hidden
from ivtp.pruning.reduces import merge
from ivtp.pruning.schedules import Cut
from ivtp.pruning.scores import Layerwise, hide_padding, reference_flops, reference_row
from ivtp.pruning.tokens import Selection, Tokens, take

WINDOWS = 4
"""Windows per side: 6 × 6 patches each in the published 24 × 24."""


@register_pruner
def vscan(
    shape: Shape, keep: int, vision_keep: int | None = None, local_layer: int | None = None, layer: int | None = None
) -> Plan:
    """VScan (arXiv 2505.22654): CLS attention of a shallow layer inside windows and of a deep layer overall, then
    merging.

    Scores     ViT: CLS rows of `local_layer` and of the penultimate layer; language: the last prompt token's attention,
               from the q and k of the layer behind the cut
    Selects    half of the ViT's budget evenly from 4 × 4 windows by the shallow score, the others by the deep one; in
               the language model the highest; in raster order
    The rest   ViT: averaged into the kept token with the most similar features; language: dropped
    Where      behind the penultimate ViT layer (`vision_keep` stay, by default twice `keep`), and before language
               `layer` (by default the middle: 16 of 32). `local_layer` counts from 0 (published: 5 of 24; by default
               the same depth)

    Published code needs 24 × 24 patches, keeps fewer where half of the budget is not a multiple of 16 (70 becomes 67;
    here the deep score fills up), and compares and merges features behind the projector; here the features that
    the projector reads, so that it works on what is left. Positions are renumbered there: position_ids=renumber.
    """
    depth = language_depth(shape, "vscan")
    deep = max(0, shape.vision.depth - 2)
    local = min(deep, round(5 * shape.vision.depth / 24)) if local_layer is None else local_layer
    layer = max(1, depth // 2) if layer is None else layer
    vision_keep = min(2 * keep, shape.patches) if vision_keep is None else vision_keep
    if not 0 <= local <= deep:
        raise ValueError(f"local_layer={local} must be between 0 and {deep}, the layer behind which vscan cuts")
    if not 1 <= layer <= depth - 1:
        raise ValueError(f"layer={layer} must be between 1 and {depth - 1}: it and one before it must exist")
    if not keep <= vision_keep <= shape.patches:
        raise ValueError(f"vision_keep={vision_keep} must be between keep={keep} and {shape.patches}")
    rows, columns = shape.grid
    each = vision_keep // 2 // (WINDOWS * WINDOWS)
    smallest = (rows // WINDOWS) * (columns // WINDOWS)
    scan = TwoScans((local, deep), rows, columns, min(each, smallest))
    return Plan(
        vision=Pruner(feature_cut(shape, vision_keep), scan, nearest_kept, merge, metric=hidden),
        language=Pruner((Cut(layer - 1, keep, "block"),), Layerwise(needs="next")),
    )


@dataclass(frozen=True)
class TwoScans:
    """The deep layer's CLS row, raised above all others for the best `each` of every window by the shallow layer's."""

    needs: tuple[int, ...]
    rows: int
    columns: int
    each: int

    def __call__(self, seen: list[Attention], tokens: Tokens) -> Float[Tensor, "b v"]:
        shallow, deep = (tokens.of_visual(reference_row(attention, tokens)) for attention in (seen[0], seen[-1]))
        window = windows(tokens.of_visual(tokens.position), self.rows, self.columns)
        # Within each window: how many come before in descending order of the shallow score.
        order = shallow.argsort(dim=1, descending=True, stable=True)
        inside = torch.nn.functional.one_hot(window.gather(1, order), WINDOWS * WINDOWS)
        rank = (inside.cumsum(1) * inside).sum(2) - 1
        local = torch.zeros_like(shallow, dtype=torch.bool).scatter(1, order, rank < self.each)
        return hide_padding(torch.where(local, deep + 2.0, deep), tokens)

    def flops(self, n: int, heads: int, head_width: int, referring: int = 1, **_: int) -> int:
        return 2 * reference_flops(n, heads, head_width, referring)


def windows(position: Tensor, rows: int, columns: int) -> Tensor:
    """The number of the window in which each patch lies."""
    row, column = position // columns, position % columns
    return row * WINDOWS // rows * WINDOWS + column * WINDOWS // columns


def nearest_kept(scores: Float[Tensor, "b v"], metric: Float[Tensor, "b v d"], keep: int, tokens: Tokens) -> Selection:
    """The highest scores in sequence order; every other token joins the kept one it resembles most (cosine)."""
    index = scores.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values
    metric = metric.float()
    metric = metric / metric.norm(dim=-1, keepdim=True)
    into = (metric @ take(metric, index).transpose(1, 2)).argmax(2)
    slots = torch.arange(keep, device=scores.device).expand(len(scores), -1)
    return Selection(index, into.scatter(1, index, slots))


def _flops(v: int, keep: int, width: int, **_: int) -> int:
    return 2 * v * keep * width


nearest_kept.flops = _flops
