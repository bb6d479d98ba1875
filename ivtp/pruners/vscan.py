"""VScan: a global and a local scan in the ViT with merging, one more cut in the middle of the language model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ivtp.core import Attention, CutSizes, Plan, Score, Select, Selection, Shape, Stage, Tokens
from ivtp.core.reduces import Merge
from ivtp.core.scores import Layerwise, hide_padding, reference_flops, reference_row
from ivtp.core.selects import Hidden, TopK, cosines, descending, in_own_slots
from ivtp.core.tokens import take
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import before_language, check_vision_keep, feature_cut, language_depth
from ivtp.registry import check_range

WINDOWS = 4
"""Windows per side: 6 × 6 patches each in the published 24 × 24."""


@register_pruner
def vscan(
    shape: Shape, keep: int, vision_keep: int | None = None, local_layer: int | None = None, layer: int | None = None
) -> Plan:
    """VScan (arXiv 2505.22654): CLS attention of a shallow layer inside windows and of a deep one overall, then merging.

    Scores     ViT: CLS rows of `local_layer` and of the penultimate layer; language: the last prompt token's attention,
               from the q and k of the layer behind the cut
    Selects    half of the ViT's budget evenly from 4 × 4 windows by the shallow score, the others by the deep one; in
               the language model the highest; in raster order
    The rest   ViT: averaged into the kept token with the most similar features; language: dropped
    Where      behind the penultimate ViT layer (`vision_keep` stay, by default twice `keep`), and before language
               `layer` (by default the middle: 16 of 32). `local_layer` counts from 0 (published: 5 of 24; by default
               the same depth)
    Budgets    192, 128, 64 of 576 behind both (published)

    Published code needs 24 × 24 patches, keeps fewer where half of the budget is not a multiple of 16 (70 becomes 67;
    here the deep score fills up), and compares and merges features behind the projector; here the features that
    the projector reads, so that it works on what is left. Positions are renumbered there: position_ids=renumber.
    """
    deep = max(0, shape.vision.depth - 2)
    local = min(deep, round(5 * shape.vision.depth / 24)) if local_layer is None else local_layer
    layer = max(1, language_depth(shape, "vscan") // 2) if layer is None else layer
    language = before_language(shape, "vscan", layer, keep)
    vision_keep = min(2 * keep, shape.patches) if vision_keep is None else vision_keep
    check_range("local_layer", local, 0, deep, ", the layer behind which vscan cuts")
    check_vision_keep(shape, keep, vision_keep)
    rows, columns = shape.grid
    each = vision_keep // 2 // (WINDOWS * WINDOWS)
    smallest = (rows // WINDOWS) * (columns // WINDOWS)
    scan = TwoScans((local, deep), rows, columns, min(each, smallest))
    return Plan(
        vision=Stage(feature_cut(shape, vision_keep), scan, NearestKept(), Merge(), metric=Hidden()),
        language=Stage(language, Layerwise(needs="next")),
    )


@dataclass(frozen=True)
class TwoScans(Score):
    """The deep layer's CLS row, raised above all others for the best `each` of every window by the shallow layer's."""

    needs: str | tuple[int, ...] = field()
    rows: int
    columns: int
    each: int

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Tensor:
        shallow, deep = (tokens.of_visual(reference_row(record, tokens)) for record in (attentions[0], attentions[-1]))
        window = windows(tokens.of_visual(tokens.position), self.rows, self.columns)
        # Within each window: how many come before in descending order of the shallow score.
        order = descending(shallow)
        inside = torch.nn.functional.one_hot(window.gather(1, order), WINDOWS * WINDOWS)
        rank = (inside.cumsum(1) * inside).sum(2) - 1
        local = torch.zeros_like(shallow, dtype=torch.bool).scatter(1, order, rank < self.each)
        return hide_padding(torch.where(local, deep + 2.0, deep), tokens)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of one reference row in each layer."""
        return 2 * reference_flops(sizes)


def windows(position: Tensor, rows: int, columns: int) -> Tensor:
    """The number of the window in which each patch lies."""
    row, column = position // columns, position % columns
    return row * WINDOWS // rows * WINDOWS + column * WINDOWS // columns


@dataclass(frozen=True)
class NearestKept(Select):
    """The highest scores in sequence order; every other token joins the kept one it resembles most (cosine)."""

    def __call__(self, scores: Tensor, metric: Tensor, keep: int, tokens: Tokens) -> Selection:
        index = TopK()(scores, None, keep, tokens).index
        return Selection(index, in_own_slots(cosines(metric, take(metric, index)).argmax(2), index))

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of the cosines with the kept tokens."""
        return 2 * sizes.v * sizes.keep * sizes.width
