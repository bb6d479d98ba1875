"""EViT: the inattentive tokens are fused into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ivtp.core import Plan, Select, Selection, Shape, Stage, Tokens
from ivtp.core.reduces import Drop, Fuse
from ivtp.core.scores import Layerwise
from ivtp.core.selects import descending, in_own_slots
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import grouped


@register_pruner
def evit(shape: Shape, keep: int, group: int | str = 3, fuse: bool = True) -> Plan:
    """EViT (arXiv 2202.07800): pruning in the ViT by the current layer's CLS attention; the rest is fused into one token.

    Scores     raw probabilities of the CLS row, mean over heads
    Selects    the highest, in descending order of score
    The rest   is summed up with its scores as weights (not normalised) in one more token, which `keep` counts; it is an
               ordinary candidate at the next cut. `fuse=False` drops it.
    Where      before the FFN of every third layer (published: layers 3, 6, 9 of 12 at keep rate 0.7, after training with
               them)
    Budgets    192, 128, 64 of 576 in comparisons

    Paper and code agree on the fused weights. The paper leaves the rounding of the keep rate open, the code rounds up;
    here a budget is met by an equal share at every cut, rounded to the nearest.
    """
    if fuse and keep < 2:
        raise ValueError(
            f"keep={keep}: evit needs at least 2 tokens, one of them for the fused rest; or set fuse=false"
        )
    select, reduce = (AttentiveAndRest(), Fuse()) if fuse else (Attentive(), Drop())
    return Plan(vision=Stage(grouped(shape, keep, group), Layerwise(raw=True), select, reduce))


@dataclass(frozen=True)
class Attentive(Select):
    """The `keep` highest scores, the highest first."""

    def __call__(self, scores: Tensor, metric: None, keep: int, tokens: Tokens) -> Selection:
        return Selection(descending(scores)[:, :keep])


@dataclass(frozen=True)
class AttentiveAndRest(Select):
    """The `keep` - 1 highest scores, the highest first; all others join the last slot, where the best of them stood."""

    def __call__(self, scores: Tensor, metric: None, keep: int, tokens: Tokens) -> Selection:
        index = descending(scores)[:, :keep]
        return Selection(index, in_own_slots(torch.full_like(scores, keep - 1, dtype=torch.long), index))
