"""ATS: tokens are sampled from the distribution of their scores, as many as differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ivtp.core import Plan, Select, Selection, Shape, Stage, Tokens
from ivtp.core.scores import Layerwise
from ivtp.core.tokens import indices
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import grouped


@register_pruner
def ats(shape: Shape, keep: int, group: int | str = 3) -> Plan:
    """Adaptive Token Sampling (arXiv 2111.15667): inverse transform sampling of the scores, at most `keep` tokens.

    Scores     CLS row of the current layer × ‖V‖, normalised over the patches
    Selects    the scores are added up from the lowest; at `keep` equally spaced heights of that curve the nearest token
               is taken, and every token once: flat images keep many, peaked ones few (a different number per image)
    The rest   is dropped
    Where      before the FFN, every `group` layers as in the other methods (published: in every block from 3 of 12 on)

    Published code: ‖V‖ of the concatenated heads, the paper sums per head; heights from the curve's lowest value to 1
    and the nearest token, the paper takes the middles of equal parts and rounds up (code followed). With fewer heights
    than tokens the released code cuts the curve off by accident of a padding; here, as in the paper, the heights span
    all of it. Its padded tokens enter the curve of a shorter sample of a batch; here padding is left out. The lowest
    score is never taken. Order: ascending score, as published.
    """
    return Plan(vision=Stage(grouped(shape, keep, group), Layerwise(True), Sampled()))


@dataclass(frozen=True)
class Sampled(Select):
    """Inverse transform sampling at `heights` places (None: as many as may stay)."""

    heights: int | None = None

    def __call__(self, scores: Tensor, metric: None, keep: int, tokens: Tokens) -> Selection:
        order, curve, real = cumulative(scores)
        _, picked = sample(curve, real, self.heights or keep)
        rank, valid = unique(picked)
        return Selection(order.gather(1, rank[:, :keep]), valid=valid[:, :keep])


def cumulative(scores: Float[Tensor, "b v"]) -> tuple[Int[Tensor, "b v"], Float[Tensor, "b v"], Bool[Tensor, "b v"]]:
    """Tokens in ascending order of score, their cumulative scores from 0 to 1, and which of them are real."""
    ascending, order = scores.sort(dim=1, stable=True)
    real = ascending > -torch.inf
    curve = ascending.masked_fill(~real, 0.0).cumsum(1)
    low = curve.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    span = curve[:, -1:] - low
    return order, (curve - low) / torch.where(span > 0, span, 1.0), real


def sample(
    curve: Float[Tensor, "b v"], real: Bool[Tensor, "b v"], heights: int
) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """Heights from the lowest value above 0 to 1, and the rank nearest to each (the lower one of two)."""
    lowest = curve.masked_fill(~real | (curve <= 0), torch.inf).amin(1, keepdim=True).clamp_max(1.0)
    step = torch.arange(heights, device=curve.device, dtype=curve.dtype)[None]
    height = lowest + (step - lowest * step) / max(1, heights - 1)
    distance = (curve.masked_fill(~real, torch.inf)[:, None] - height[:, :, None]).abs()
    return height, distance.argmin(2)


def unique(picked: Int[Tensor, "b k"]) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"]]:
    """Ranks without repetition, brought to the front, and which of them count. Ranks come in ascending order."""
    new = torch.ones_like(picked, dtype=torch.bool)
    new[:, 1:] = picked[:, 1:] != picked[:, :-1]
    front = indices(new, new.shape[1])
    return picked.gather(1, front), new.gather(1, front)
