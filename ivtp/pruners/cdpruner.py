"""CDPruner: diversity conditioned on the instruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import language_depth
from ivtp.pruning.attention import Attention
from ivtp.pruning.cost import Shape
from ivtp.pruning.diversity import greedy_dpp_flops, greedy_dpp_order
from ivtp.pruning.pruner import Plan, Pruner, hidden
from ivtp.pruning.schedules import Cut
from ivtp.pruning.scores import hide_padding
from ivtp.pruning.tokens import Selection, Tokens


@register_pruner
def cdpruner(shape: Shape, keep: int, negate: bool = True) -> Plan:
    """CDPruner (arXiv 2506.10967): greedy MAP of a determinantal process over features that fit the instruction.

    Scores     cosine of every visual token (penultimate ViT layer, last norm, CLIP's visual projection) with the
               instruction in CLIP's joint space, mean over its chunks of 77 tokens; negated, then scaled to 0 … 1
    Selects    greedily what adds most to the determinant of relevance × cosine of projected features × relevance
    The rest   is dropped
    Where      before the first language layer

    Published code negates the cosine, as CLIP's patches tend to be unlike what they show; the paper does not
    (`negate=False`). It adds 1e-6 above the line only, and scales over the whole batch; here over each image. A budget
    above the rank of the features is filled up in sequence order, where the code runs into round-off.
    """
    language_depth(shape, "cdpruner")
    return Plan(
        language=Pruner((Cut(-1, keep, "block"),), Relevance(negate), conditional_dpp, metric=hidden),
    )


@dataclass(frozen=True)
class Relevance:
    """How well each visual token fits the instruction, as the backbone was asked to find out."""

    negate: bool = True
    needs = "none"
    reads_relevance = True

    def __call__(self, seen: list[Attention], tokens: Tokens) -> Float[Tensor, "b v"]:
        fit = tokens.of_visual(tokens.relevance).float()
        return hide_padding(-fit if self.negate else fit, tokens)


def scaled(scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """(score - least + 1e-6) / (most - least) of each sample; padding, at -inf, gets 0."""
    real = scores > -torch.inf
    low = scores.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    high = scores.amax(1, keepdim=True)
    span = torch.where(high > low, high - low, 1.0)
    return ((scores - low + 1e-6) / span).masked_fill(~real, 0.0)


def conditional_dpp(
    scores: Float[Tensor, "b v"], metric: Float[Tensor, "b v d"], keep: int, tokens: Tokens
) -> Selection:
    """Relevant and diverse, in sequence order."""
    return Selection(greedy_dpp_order(scaled(scores), metric, keep, scores > -torch.inf).sort(dim=1).values)


def _flops(v: int, keep: int, width: int, **_: int) -> int:
    return greedy_dpp_flops(v, keep, width)


conditional_dpp.flops = _flops
