"""VisPruner: important tokens by CLS attention, diverse ones by removing duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ivtp.core import CutSizes, Plan, Select, Selection, Shape, Stage, Tokens
from ivtp.core.pairs import Pairs, pair_flops
from ivtp.core.scores import Layerwise
from ivtp.core.selects import Hidden, TopK, descending
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import feature_cut
from ivtp.registry import check_range

STEP = 8
NEAR = 16


@register_pruner
def vispruner(shape: Shape, keep: int, important_ratio: float = 0.5) -> Plan:
    """VisPruner (arXiv 2412.01818 v2): half of the tokens by CLS attention, half by removing near duplicates.

    Scores     CLS row of the penultimate ViT layer, mean over heads
    Selects    the best `important_ratio` of the budget; from the others, in descending order of score, every second one
               is compared with those between (cosine of features), and the 8 that have the nearest double go, again
               and again, until the budget is met
    The rest   is dropped
    Where      behind the penultimate ViT layer
    Budgets    192, 128, 64 of 576 (published), with position_ids=renumber

    The step of 8 is in the published code, not in the paper. That code fails when an odd number of tokens is left, and
    for fewer than 8 diverse tokens; here an odd one out belongs to the first set, no step removes more than half, and
    fewer than 8 diverse tokens are refused.
    """
    check_range("important_ratio", important_ratio, 0, 1)
    diverse = keep - int(keep * important_ratio)
    if 0 < diverse < STEP and keep < shape.patches:
        raise ValueError(
            f"keep={keep} with important_ratio={important_ratio} leaves {diverse} diverse tokens, but vispruner needs "
            f"at least {STEP} (or none: important_ratio=1); keep more or lower important_ratio"
        )
    select = ImportantAndDiverse(important_ratio)
    return Plan(vision=Stage(feature_cut(shape, keep), Layerwise(), select, metric=Hidden()))


@dataclass(frozen=True)
class ImportantAndDiverse(Select):
    """The highest scores, and of the others those without a double, in sequence order."""

    important_ratio: float

    def __call__(self, scores: Tensor, metric: Tensor, keep: int, tokens: Tokens) -> Selection:
        important = int(keep * self.important_ratio)
        if important == keep:
            return TopK()(scores, None, keep, tokens)
        order = descending(scores)
        valid = tokens.of_visual(tokens.valid)
        diverse = without_doubles(Pairs.of(metric), valid, order[:, important:], keep - important)
        return Selection(torch.cat([order[:, :important], diverse], 1).sort(dim=1).values)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of all cosines, where any token is chosen by them. Of images so large that no map is formed, the rows that
        depend on the data are left out."""
        important = int(sizes.keep * self.important_ratio)
        if important == sizes.keep:
            return 0
        passes, left, fresh = 0, sizes.v - important, 2 * (sizes.v - important) + 1
        while left > sizes.keep - important:
            if 2 * left < fresh:
                passes, fresh = passes + 1, left
            left -= min(STEP, left - (sizes.keep - important), (left + 1) // 2)
        return pair_flops(sizes.v, sizes.width, passes, 0)


def without_doubles(pairs: Pairs, valid: Tensor, left: Tensor, keep: int) -> Tensor:
    """The `keep` of the tokens `left` "b r" that stay when those with the nearest double go, `STEP` at a time, by their
    cosines. Padding is a double of every token, so it goes first.

    A token's double is looked for among its `NEAR` nearest neighbours first, and in its whole row only if none of
    them is in the second set; the neighbours are renewed whenever half of the tokens are gone. The answer is exact.
    """
    b, v = valid.shape
    sample = torch.arange(b, device=left.device)[:, None]
    fresh = 2 * left.shape[1] + 1
    while left.shape[1] > keep:
        if 2 * left.shape[1] < fresh:
            fresh = left.shape[1]
            here = torch.zeros(b, v, dtype=torch.bool, device=left.device).scatter(1, left, True)
            parts = [
                masked(cosine, valid[:, some, None], valid[:, None])
                .masked_fill(~here[:, None], -torch.inf)
                .topk(min(NEAR, v), dim=2)
                for some, cosine in pairs.blocks()
            ]
            values, indices = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        first, second = left[:, 0::2], left[:, 1::2]
        is_second = torch.zeros(b, v, dtype=torch.bool, device=left.device).scatter(1, second, True)
        place = indices[sample, first]
        double = torch.where(is_second[sample[:, :, None], place], values[sample, first], -torch.inf).amax(2)
        which, column = torch.nonzero(double == -torch.inf, as_tuple=True)
        alone = first[which, column]
        rows = masked(pairs.rows_of(which, alone), valid[which, alone][:, None], valid[which])
        double[which, column] = rows.masked_fill(~is_second[which], -torch.inf).amax(1)
        gone = min(STEP, left.shape[1] - keep, first.shape[1])
        stays = double.argsort(dim=1, descending=True, stable=True)[:, gone:]
        left = torch.cat([first.gather(1, stays), second], 1)
    return left


def masked(cosine: Tensor, real: Tensor, others: Tensor) -> Tensor:
    """Cosines of tokens with others; padding is a double of all others, and no token's double."""
    return cosine.masked_fill(~real, 2.0).masked_fill(~others, -2.0)
