"""Selects: (scores, metric, how many, tokens) → which visual tokens stay and what the others join."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ivtp.pruning.tokens import Selection, Tokens


@runtime_checkable
class Select(Protocol):
    def __call__(self, scores: Tensor | None, metric: Tensor | None, keep: int, tokens: Tokens) -> Selection: ...


def top_k(scores: Float[Tensor, "b v"], metric: Tensor | None, keep: int, tokens: Tokens) -> Selection:
    """The `keep` highest scores, in sequence order; of equal scores the lower index stays.

    >>> visual = torch.ones(1, 4, dtype=torch.bool)
    >>> tokens = Tokens.of(torch.zeros(1, 4, 8), visual, ~visual)
    >>> top_k(torch.tensor([[0.1, 0.4, 0.2, 0.4]]), None, 2, tokens).index
    tensor([[1, 3]])
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    return Selection(order[:, :keep].sort(dim=1).values)


def bipartite(scores: Tensor | None, metric: Float[Tensor, "b v e"], keep: int, tokens: Tokens) -> Selection:
    """ToMe's bipartite soft matching (arXiv 2210.09461): every other token meets the rest, the most similar ones join.

    One step merges at most half of the tokens. A class token in front, and a distillation token behind it, take part in
    the alternation, though not in the merging, as in the published code, so behind a lone class token the first patch
    belongs to the second set. Order of what stays: the unmerged of the first set, then the second set (the next step
    alternates over that order).
    """
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
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, first] @ metric[:, second].transpose(1, 2)
    best, partner = similarity.max(-1)
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, stays = order[:, :merges], order[:, merges:]
    if prefix:  # as published: sorted only when there is a class token to bring to the front
        stays = stays.sort(dim=1).values

    index = torch.cat([first[stays], second.expand(b, -1)], 1)
    into = torch.empty(b, v, dtype=torch.long, device=metric.device)
    into.scatter_(1, index, torch.arange(keep, device=metric.device).expand(b, -1))
    into.scatter_(1, first[merged], partner.gather(1, merged) + stays.shape[1])
    return Selection(index, into)


def _bipartite_flops(v: int, head_width: int, **_: int) -> int:
    """The similarities of the two sets."""
    return 2 * (v // 2) * (v - v // 2) * head_width


bipartite.flops = _bipartite_flops
