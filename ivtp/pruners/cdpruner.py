"""CDPruner: diversity conditioned on the instruction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ivtp.core import Attention, CutSizes, Plan, Schedule, Score, Select, Selection, Shape, Stage, Tokens
from ivtp.core.pairs import Pairs, pair_flops
from ivtp.core.scores import hide_padding
from ivtp.core.selects import Hidden
from ivtp.pruners import register_pruner


@register_pruner
def cdpruner(shape: Shape, keep: int, negate: bool = True) -> Plan:
    """CDPruner (arXiv 2506.10967): greedy MAP of a determinantal process over features that fit the instruction.

    Scores     cosine of every visual token (penultimate ViT layer, last norm, CLIP's visual projection) with the
               instruction in CLIP's joint space, mean over its chunks of 77 tokens; negated, then scaled to 0 … 1
    Selects    greedily the token that adds most to the determinant of relevance × cosine of projected features × relevance
    The rest   is dropped
    Where      before the first language layer; needs the CLIP text encoder
    Budgets    192, 128, 64 of 576 (published), with position_ids=renumber

    Published code negates the cosine, as CLIP's patches tend to be unlike what they show; the paper does not
    (`negate=False`). It adds 1e-6 above the line only, and scales over the whole batch; here over each image. A budget
    above the rank of the features is filled up in sequence order, where the code runs into round-off.
    """
    before = Schedule.at([-1], [keep], "block")
    return Plan(language=Stage(before, Relevance(negate), ConditionalDpp(), metric=Hidden()))


@dataclass(frozen=True)
class Relevance(Score):
    """Cosine of each visual token with the instruction in CLIP's joint space, which the backbone provides."""

    negate: bool = True
    needs = "none"
    reads_relevance = True

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Tensor:
        assert tokens.relevance is not None
        fit = tokens.of_visual(tokens.relevance).float()
        return hide_padding(-fit if self.negate else fit, tokens)


def scaled(scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """(score - least + 1e-6) / (most - least) of each sample; padding, at -inf, gets 0."""
    real = scores > -torch.inf
    low = scores.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    high = scores.amax(1, keepdim=True)
    span = torch.where(high > low, high - low, 1.0)
    return ((scores - low + 1e-6) / span).masked_fill(~real, 0.0)


@dataclass(frozen=True)
class ConditionalDpp(Select):
    """Relevant and diverse tokens, in sequence order."""

    def __call__(self, scores: Tensor, metric: Tensor, keep: int, tokens: Tokens) -> Selection:
        return Selection(greedy_dpp_order(scaled(scores), metric, keep, scores > -torch.inf).sort(dim=1).values)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of all cosines, and of the projections on the tokens that are chosen already."""
        cosines = pair_flops(sizes.v, sizes.width, 0, sizes.keep)
        return cosines + sizes.keep * (sizes.keep - 1) * sizes.v


def greedy_dpp_order(
    quality: Float[Tensor, "b v"], metric: Float[Tensor, "b v d"], keep: int, valid: Tensor | None = None
) -> Int[Tensor, "b k"]:
    """The order in which greedy MAP inference picks from the determinantal process with kernel q_i cos(i, j) q_j.

    Incremental Cholesky updates (arXiv 1709.05135). A kernel of lower rank than `keep` is filled up with what is left,
    in sequence order; the published code of CDPruner runs into round-off there.
    """
    pairs = Pairs.of(metric)
    left = quality * pairs.diagonal() * quality
    floor = 1e-6 * left  # below that, a token adds nothing but round-off
    if valid is not None:
        left = left.masked_fill(~valid, -torch.inf)
    b, v = quality.shape
    factor = left.new_zeros(b, keep, v)
    chosen = []
    for step in range(keep):
        left = torch.where((left > floor) | (left == -torch.inf), left, 0.0)
        pick = left.argmax(1, keepdim=True)
        chosen.append(pick)
        row = quality.gather(1, pick) * pairs.rows(pick)[:, 0] * quality
        if step:
            known = factor[:, :step]
            row = row - (known.gather(2, pick[:, :, None].expand(-1, step, -1)).transpose(1, 2) @ known)[:, 0]
        pivot = left.gather(1, pick)
        row = torch.where(pivot > 0, row / pivot.clamp_min(1e-30).sqrt(), 0.0)
        factor[:, step] = row
        left = (left - row.square()).scatter(1, pick, -torch.inf)
    return torch.cat(chosen, 1)
