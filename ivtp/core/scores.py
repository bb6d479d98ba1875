"""Scores: (group attentions, tokens) → how much each visual token matters, "b v", float32, higher stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ivtp.core.attention import Attention
from ivtp.core.choices import CutSizes, Score
from ivtp.core.tokens import Scalars, Tokens
from ivtp.registry import check_choice

COMBINES = ("residual", "mean", "max", "multiply")


@dataclass(frozen=True)
class Rollout(Score):
    """Attention rollout inside the group of layers since the last cut (IVTP, Eq. 3 and 4; arXiv 2005.00928 for rollout).

    combine     residual: Ã^l = (A^l + I) Ã^(l-1) (Eq. 3); multiply: the same without I; mean, max: over the layers'
                reference rows (a maximum over whole maps is not linear and would need them: it is not offered)
    value_norm  weigh by ‖V‖ of the group's last layer (Eq. 4)
    Only the reference row of Ã is needed, so it is pushed through the layers from the last to the first, O(n) memory.
    """

    combine: str = "residual"
    value_norm: bool = True

    def __post_init__(self) -> None:
        check_choice("combine", self.combine, COMBINES)

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Scalars:
        if self.combine in ("mean", "max"):
            rows = torch.stack([reference_row(attention, tokens) for attention in attentions])
            row = rows.mean(0) if self.combine == "mean" else rows.amax(0)
        else:
            row = reference_row(attentions[-1], tokens)
            if len(attentions) > 1 and self.combine == "residual":
                row = row + reference_weight(tokens)
            for depth, attention in enumerate(reversed(attentions[:-1]), start=2):
                pushed = attention.propagate(row)
                # The first layer of the group carries no residual: Ã^{l1} = A^{l1}.
                row = pushed + row if self.combine == "residual" and depth < len(attentions) else pushed
        return importance(row, attentions[-1], tokens, self.value_norm)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of the streamed form."""
        reference = reference_flops(sizes)
        if self.combine in ("mean", "max"):
            return sizes.group * reference
        return reference + (sizes.group - 1) * propagate_flops(sizes.n, sizes.heads, sizes.head_width)


@dataclass(frozen=True)
class Layerwise(Score):
    """The reference token's attention in one layer only: TopK and the "layer-wise" row of the paper's Table 4.

    raw    the probabilities as they are, not normalised over the visual tokens (EViT weighs with them)
    needs  "last": the current layer's attention; "next": the one that the next layer would form (PyramidDrop)
    """

    value_norm: bool = False
    raw: bool = False
    needs: str | tuple[int, ...] = "last"

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Scalars:
        row = reference_row(attentions[-1], tokens)
        if self.raw:
            return hide_padding(tokens.of_visual(row), tokens)
        return importance(row, attentions[-1], tokens, self.value_norm)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of one reference row."""
        return reference_flops(sizes)


@dataclass(frozen=True)
class Random(Score):
    """Uniform noise from (seed, sample, number of tokens left, position): the same whatever batch the sample is in."""

    seed: int = 0
    needs = "none"

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Scalars:
        # The number of tokens left differs from cut to cut, so every cut draws anew.
        left = tokens.of_visual(tokens.valid).sum(1)
        key = mix(tokens.sample + mix(left + self.seed * 1_000_003))
        noise = mix(key[:, None] + mix(tokens.of_visual(tokens.position).long()))
        score = (noise >> 40).bitwise_and((1 << 23) - 1).float() / (1 << 23)
        return hide_padding(score, tokens)


@dataclass(frozen=True)
class TargetFirst(Score):
    """The oracle: the target patches first, the others at random. Ground truth stands in `tokens.relevance`."""

    seed: int = 0
    needs = "none"
    reads_target = True

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Scalars:
        assert tokens.relevance is not None
        return Random(self.seed)(attentions, tokens) + tokens.of_visual(tokens.relevance).float()


def mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64: a good hash of each entry, equal on every device."""
    z = z + -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def row_flops(n: int, heads: int, head_width: int) -> int:
    """The logits of one query: 2 × MAC of q kᵀ over all heads."""
    return 2 * n * heads * head_width


def propagate_flops(n: int, heads: int, head_width: int) -> int:
    """A row vector times the map: the logits of all queries, and their product with the weights, head by head."""
    return n * row_flops(n, heads, head_width + 1)


def reference_flops(sizes: CutSizes) -> int:
    """The reference row: one query's, or the mean over several."""
    row = row_flops if sizes.references == 1 else propagate_flops
    return row(sizes.n, sizes.heads, sizes.head_width)


def reference_weight(tokens: Tokens) -> Float[Tensor, "b n"]:
    """The reference tokens as weights over the sequence that sum to one."""
    weight = (tokens.reference & tokens.valid).float()
    return weight / weight.sum(1, keepdim=True).clamp_min(1)


def reference_row(attention: Attention, tokens: Tokens) -> Float[Tensor, "b m"]:
    """The row of the attention map that scores the tokens: one reference token's, or the mean of several."""
    if tokens.facts.lone:
        return attention.rows(tokens.reference.int().argmax(1, keepdim=True))[:, 0]
    return attention.propagate(reference_weight(tokens))


def importance(row: Tensor, last: Attention, tokens: Tokens, value_norm: bool) -> Scalars:
    """Eq. 4: the row over the visual tokens, weighed by ‖V‖, normalised to sum to one."""
    if value_norm:
        row = row * last.value_norm()
    score = tokens.of_visual(row)
    if tokens.facts.padded:
        score = score.masked_fill(~tokens.of_visual(tokens.valid), 0.0)
    total = score.sum(1, keepdim=True)
    return hide_padding(score / torch.where(total > 0, total, 1.0), tokens)


def hide_padding(score: Tensor, tokens: Tokens) -> Tensor:
    """Score padding -inf, so that it is never chosen before a real token."""
    if not tokens.facts.padded:
        return score
    return score.masked_fill(~tokens.of_visual(tokens.valid), float("-inf"))
