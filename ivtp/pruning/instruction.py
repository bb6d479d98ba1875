"""Instruction guidance (IVTP, Eq. 5–8): from words that CLIP finds relevant to the image to a pseudo CLS for the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Span = tuple[int, int]
"""Half-open range of characters, counted without white space: the same in every tokenizer of the same text."""


@dataclass(frozen=True)
class Spelled:
    """Tokens of one text and the characters that each one spells."""

    spans: list[Span]
    features: Float[Tensor, "s d"]


def squeeze(text: str) -> str:
    """The text without white space: tokenizers disagree on spaces, never on the rest."""
    return "".join(text.split())


def squeezed_spans(text: str, offsets: list[Span]) -> list[Span]:
    """Offsets into `text`, as tokenizers return them, as spans of its squeezed characters."""
    before = [0]
    for character in text:
        before.append(before[-1] + (not character.isspace()))
    return [(before[start], before[end]) for start, end in offsets]


def relevance(cls: Float[Tensor, " d"], features: Float[Tensor, "s d"]) -> Float[Tensor, " s"]:
    """Eq. 6: cosine of every text token with the visual CLS, both in the joint space."""
    return torch.cosine_similarity(cls[None].float(), features.float(), dim=-1)


def align(relevance: Float[Tensor, " s"], spans: list[Span], targets: list[Span]) -> Float[Tensor, " t"]:
    """Eq. 7: an LLM token's relevance is the mean over the CLIP tokens that spell the same characters.

    An LLM token that shares no character with any (a space, a line break) gets -inf: it is never relevant.
    """
    start = torch.tensor([s for s, _ in spans], device=relevance.device)
    end = torch.tensor([e for _, e in spans], device=relevance.device)
    first = torch.tensor([s for s, _ in targets], device=relevance.device)[:, None]
    past = torch.tensor([e for _, e in targets], device=relevance.device)[:, None]
    shared = (torch.minimum(past, end) > torch.maximum(first, start)).float()
    count = shared.sum(1)
    return torch.where(count > 0, shared @ relevance / count.clamp_min(1), float("-inf"))


def pseudo_cls(
    embeddings: Float[Tensor, "b n d"],
    relevance: Float[Tensor, "b n"],
    tau: float,
    fallback: Float[Tensor, "b d"],
) -> Float[Tensor, "b d"]:
    """Eq. 8: the mean LLM embedding of the tokens with relevance ≥ τ; where none passes, `fallback`.

    The paper falls back to the visual CLS; that it goes through the projector is our reading: it must have LLM width.
    """
    passes = relevance >= tau
    count = passes.sum(1, keepdim=True)
    mean = (embeddings * passes[:, :, None].to(embeddings.dtype)).sum(1) / count.clamp_min(1).to(embeddings.dtype)
    return torch.where(count > 0, mean, fallback.to(embeddings.dtype))
