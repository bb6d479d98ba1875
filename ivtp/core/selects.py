"""Selects: (scores, metric, how many, tokens) → which visual tokens stay and what the others join.

Metrics: (group attentions, tokens) → vectors "b v e" by which a select compares tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from ivtp.core.attention import Attention
from ivtp.core.choices import CutSizes, Metric, Select
from ivtp.core.pairs import Pairs, pair_flops
from ivtp.core.tokens import Scalars, Selection, Tokens, Vectors


@dataclass(frozen=True)
class Keys(Metric):
    """Keys of the current layer, mean over heads: ToMe's metric."""

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Vectors:
        return tokens.of_visual(attentions[-1].keys())


@dataclass(frozen=True)
class Hidden(Metric):
    """Hidden states; before the first language layer: the projected features."""

    needs = "none"

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Vectors:
        return tokens.of_visual(tokens.x)


@dataclass(frozen=True)
class TopK(Select):
    """The `keep` highest scores, in sequence order; of equal scores the lower index stays.

    >>> visual = torch.ones(1, 4, dtype=torch.bool)
    >>> tokens = Tokens.of(torch.zeros(1, 4, 8), visual, ~visual)
    >>> TopK()(torch.tensor([[0.1, 0.4, 0.2, 0.4]]), None, 2, tokens).index
    tensor([[1, 3]])
    """

    def __call__(self, scores: Scalars, metric: Any, keep: int, tokens: Tokens) -> Selection:
        return Selection(descending(scores)[:, :keep].sort(dim=1).values)


@dataclass(frozen=True)
class Bipartite(Select):
    """ToMe's bipartite soft matching (arXiv 2210.09461): every other token meets the rest, the most similar ones join.

    One step merges at most half of the tokens. A class token in front, and a distillation token behind it, take part in
    the alternation, though not in the merging, as in the published code, so behind a lone class token the first patch
    belongs to the second set. Order of what stays: the unmerged of the first set, then the second set (the next step
    alternates over that order).
    """

    def __call__(self, scores: Any, metric: Vectors, keep: int, tokens: Tokens) -> Selection:
        b, v, _ = metric.shape
        prefix = tokens.facts.lead
        lead = prefix % 2  # the published alternation counts the class token as number 0
        merges = v - keep
        if merges > v // 2:
            raise ValueError(
                f"keep={keep} of {v} tokens needs {merges} merges in one step, but bipartite matching can do {v // 2}; "
                "spread them over more layers"
            )
        place = torch.arange(v, device=metric.device)
        first, second = place[lead::2], place[1 - lead :: 2]
        best, partner = cosines(metric[:, lead::2], metric[:, 1 - lead :: 2]).max(-1)
        order = descending(best)
        merged, stays = order[:, :merges], order[:, merges:]
        if prefix:  # as published: sorted only when there is a class token to bring to the front
            stays = stays.sort(dim=1).values
        index = torch.cat([first[stays], second.expand(b, -1)], 1)
        into = torch.empty(b, v, dtype=torch.long, device=metric.device)
        into.scatter_(1, first[merged], partner.gather(1, merged) + stays.shape[1])
        return Selection(index, in_own_slots(into, index))

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of the cosines between both sets."""
        return 2 * (sizes.v // 2) * (sizes.v - sizes.v // 2) * sizes.head_width


@dataclass(frozen=True)
class MaxMin(Select):
    """Greedy max-min diversity by cosine distance (DivPrune, arXiv 2503.02175), in sequence order."""

    def __call__(self, scores: Any, metric: Vectors, keep: int, tokens: Tokens) -> Selection:
        return Selection(max_min_order(metric, keep, tokens.of_visual(tokens.valid)).sort(dim=1).values)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of all cosines."""
        return pair_flops(sizes.v, sizes.width, 1, sizes.keep)


def max_min_order(metric: Vectors, keep: int, valid: Bool[Tensor, "b v"] | None = None) -> Int[Tensor, "b k"]:
    """The order of choice: the token farthest from its nearest neighbour, then the farthest from all chosen ones."""
    pairs, gone = Pairs.of(metric), None if valid is None else ~valid

    def from_chosen(order: Int[Tensor, "b 1"]) -> Float[Tensor, "b v"]:
        distance = 1 - pairs.rows(order)[:, 0]
        if gone is None:
            return distance
        return distance.masked_fill(gone.gather(1, order), torch.inf).masked_fill(gone, -torch.inf)

    nearest = []
    for _, cosine in pairs.blocks():
        distance = 1 - cosine
        if gone is not None:
            distance = distance.masked_fill_(gone[:, None], torch.inf)
        # The smallest entry of a row is the token itself.
        nearest.append(distance.topk(2, dim=2, largest=False).values[:, :, 1])
    nearest = torch.cat(nearest, 1)
    if gone is not None:  # padding is never chosen before a real token
        nearest = nearest.masked_fill(gone, -torch.inf)
    order = nearest.argmax(1, keepdim=True)
    nearest = from_chosen(order)
    chosen = [order]
    for _ in range(keep - 1):  # steps are sequential; each handles the whole batch
        nearest = nearest.scatter(1, order, -torch.inf)
        order = nearest.argmax(1, keepdim=True)
        chosen.append(order)
        nearest = torch.minimum(nearest, from_chosen(order))
    return torch.cat(chosen, 1)


def descending(scores: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Indices in descending order of score; of equal scores the lower index comes first."""
    return scores.argsort(dim=1, descending=True, stable=True)


def cosines(x: Float[Tensor, "b p d"], y: Float[Tensor, "b q d"]) -> Float[Tensor, "b p q"]:
    """Cosine of every vector of x with every vector of y, float32."""
    return normalize(x.float(), dim=-1) @ normalize(y.float(), dim=-1).transpose(1, 2)


def in_own_slots(into: Int[Tensor, "b v"], index: Int[Tensor, "b k"]) -> Int[Tensor, "b v"]:
    """`into` with the slot of every kept token at its own place."""
    return into.scatter(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
