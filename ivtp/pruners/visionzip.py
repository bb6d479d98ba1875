"""VisionZip: dominant tokens, and contextual ones that take in the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import feature_cut
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner, keys
from ivtp.pruning.reduces import absorb
from ivtp.pruning.scores import Layerwise
from ivtp.pruning.tokens import Selection, Tokens, take


@register_pruner
def visionzip(shape: Shape, keep: int, contextual: int | None = None) -> Plan:
    """VisionZip (arXiv 2412.04467): the most attended tokens stay, the others merge into evenly spaced ones.

    Scores     CLS row of the penultimate ViT layer, heads summed (our mean ranks the same)
    Selects    `keep` - `contextual` dominant tokens by score; of the rest every s-th becomes a contextual one
    The rest   joins the contextual token of most similar keys (mean over heads): target + mean of what joins it
    Where      behind the penultimate ViT layer. By default 10 of 64 are contextual, as published (192 = 162 + 30, …)

    Published code counts the CLS token among the dominant ones and sends it to the language model; here `keep` counts
    patches and CLS stays in the tower, as in the other methods. The paper merges by averaging; the code adds the mean
    of the others to the target (followed). The language model reads tokens in raster order, not dominant ones first.
    """
    if contextual is None:
        contextual = max(1, round(keep * 10 / 64))
    if not 1 <= contextual < keep:
        raise ValueError(
            f"contextual={contextual} must be at least 1 and below keep={keep}, the tokens that stay in all"
        )
    select = DominantAndContextual(contextual)
    return Plan(vision=Pruner(feature_cut(shape, keep), Layerwise(), select, absorb, metric=keys))


@dataclass(frozen=True)
class DominantAndContextual:
    """Highest scores in sequence order, then `contextual` targets at equal steps through the others, which join."""

    contextual: int

    def __call__(
        self, scores: Float[Tensor, "b v"], metric: Float[Tensor, "b v e"], keep: int, tokens: Tokens
    ) -> Selection:
        b, v = scores.shape
        dominant = keep - self.contextual
        order = scores.argsort(dim=1, descending=True, stable=True)
        chosen, rest = order[:, :dominant].sort(dim=1).values, order[:, dominant:].sort(dim=1).values
        place = torch.arange(v - dominant, device=scores.device)
        step = max(1, (v - dominant) // self.contextual)
        is_target = (place % step == 0) & (place < step * self.contextual)
        targets, others = rest[:, is_target], rest[:, ~is_target]

        metric = metric / metric.norm(dim=-1, keepdim=True)
        nearest = (take(metric, others) @ take(metric, targets).transpose(1, 2)).argmax(-1)
        index = torch.cat([chosen, targets], 1)
        into = torch.empty(b, v, dtype=torch.long, device=scores.device)
        into.scatter_(1, index, torch.arange(keep, device=scores.device).expand(b, -1))
        into.scatter_(1, others, nearest + dominant)
        return Selection(index, into.masked_fill(~tokens.of_visual(tokens.valid), -1))

    def flops(self, v: int, keep: int, head_width: int, **_: int) -> int:
        return 2 * (v - keep) * self.contextual * head_width
