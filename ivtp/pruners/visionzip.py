"""VisionZip: dominant tokens, and contextual ones that take in the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ivtp.core import CutSizes, Plan, Select, Selection, Shape, Stage, Tokens
from ivtp.core.reduces import Absorb
from ivtp.core.scores import Layerwise
from ivtp.core.selects import Keys, cosines, descending, in_own_slots
from ivtp.core.tokens import take
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import feature_cut


@register_pruner
def visionzip(shape: Shape, keep: int, contextual: int | None = None) -> Plan:
    """VisionZip (arXiv 2412.04467): the most attended tokens stay, the others merge into evenly spaced ones.

    Scores     CLS row of the penultimate ViT layer, heads summed (our mean ranks the same)
    Selects    `keep` - `contextual` dominant tokens by score; of the rest every s-th becomes a contextual one
    The rest   joins the contextual token of most similar keys (mean over heads): target + mean of what joins it
    Where      behind the penultimate ViT layer. By default 10 of 64 are contextual
    Budgets    192 = 162 + 30, 128 = 108 + 20, 64 = 54 + 10 (published)

    Published code counts the CLS token among the dominant ones and sends it to the language model; here `keep` counts
    patches and CLS stays in the tower, as in the other methods. The paper merges by averaging; the code adds the mean
    of the others to the target (followed). The language model reads tokens in raster order, not dominant ones first;
    positions are renumbered there (position_ids=renumber).
    """
    if contextual is None:
        contextual = max(1, round(keep * 10 / 64))
    if not 1 <= contextual < keep:
        raise ValueError(
            f"contextual={contextual} must be at least 1 and below keep={keep}, the tokens that stay in all"
        )
    select = DominantAndContextual(contextual)
    return Plan(vision=Stage(feature_cut(shape, keep), Layerwise(), select, Absorb(), metric=Keys()))


@dataclass(frozen=True)
class DominantAndContextual(Select):
    """Highest scores in sequence order, then `contextual` targets at equal steps through the others, which join."""

    contextual: int

    def __call__(self, scores: Tensor, metric: Tensor, keep: int, tokens: Tokens) -> Selection:
        v, dominant = scores.shape[1], keep - self.contextual
        order = descending(scores)
        chosen, rest = order[:, :dominant].sort(dim=1).values, order[:, dominant:].sort(dim=1).values
        place = torch.arange(v - dominant, device=scores.device)
        step = max(1, (v - dominant) // self.contextual)
        is_target = (place % step == 0) & (place < step * self.contextual)
        targets, others = rest[:, is_target], rest[:, ~is_target]
        nearest = cosines(take(metric, others), take(metric, targets)).argmax(-1)
        index = torch.cat([chosen, targets], 1)
        into = in_own_slots(torch.empty_like(order).scatter(1, others, nearest + dominant), index)
        return Selection(index, into.masked_fill(~tokens.of_visual(tokens.valid), -1))

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of the cosines between contextual and other tokens."""
        return 2 * (sizes.v - sizes.keep) * self.contextual * sizes.head_width
