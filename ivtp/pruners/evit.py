"""EViT: the inattentive tokens are fused into one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import grouped, vision_layers
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.reduces import drop
from ivtp.pruning.reduces import fuse as fuse_rest
from ivtp.pruning.scores import Layerwise
from ivtp.pruning.tokens import Selection, Tokens


@register_pruner
def evit(shape: Shape, keep: int, group: int | str = 3, fuse: bool = True) -> Plan:
    """EViT (arXiv 2202.07800): CLS attention of the current layer, averaged over heads, decides in the ViT, before the
    FFN.

    Scores     raw probabilities of the CLS row
    Selects    the highest, in descending order of score
    The rest   is summed up with its scores as weights (not normalised) in one more token, which `keep` counts; it is an
               ordinary candidate at the next cut. `fuse=False` drops it.
    Where      every third layer (published: layers 3, 6, 9 of 12 at keep rate 0.7, after training with them)

    Paper and code agree on the fused weights. The paper leaves the rounding of the keep rate open, the code rounds up;
    here a budget is met by an equal share at every cut, rounded to the nearest.
    """
    if fuse and keep < 2:
        raise ValueError(
            f"keep={keep}: evit needs at least 2 tokens, one of them for the fused rest; or set fuse=false"
        )
    cuts = grouped(vision_layers(shape), group, shape.patches, keep)
    select, reduce = (attentive_and_rest, fuse_rest) if fuse else (attentive, drop)
    return Plan(vision=Pruner(cuts, Layerwise(raw=True), select, reduce))


def attentive(scores: Float[Tensor, "b v"], metric: Tensor | None, keep: int, tokens: Tokens) -> Selection:
    """The `keep` highest scores, the highest first."""
    return Selection(scores.argsort(dim=1, descending=True, stable=True)[:, :keep])


def attentive_and_rest(scores: Float[Tensor, "b v"], metric: Tensor | None, keep: int, tokens: Tokens) -> Selection:
    """The `keep` - 1 highest scores, the highest first; all others join the last slot, where the best of them stood."""
    index = attentive(scores, metric, keep, tokens).index
    into = torch.full_like(scores, keep - 1, dtype=torch.long)
    slots = torch.arange(keep - 1, device=scores.device).expand(len(scores), -1)
    return Selection(index, into.scatter_(1, index[:, :-1], slots))
