"""Instruction guidance (IVTP, Eq. 5–8): from words that CLIP scores as relevant to the image to a pseudo CLS for the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ivtp.core.tokens import Tokens, take

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
    """Offsets into `text`, as tokenizers return them, as spans of its squeezed characters.

    >>> squeezed_spans("a red ball", [(0, 1), (1, 5), (5, 10)])
    [(0, 1), (1, 4), (4, 8)]
    """
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

    >>> align(torch.tensor([0.5, 0.25]), [(0, 3), (3, 6)], [(0, 6), (2, 3), (7, 7)])  # two CLIP tokens, three LLM tokens
    tensor([0.3750, 0.5000,   -inf])
    """
    start = torch.tensor([s for s, _ in spans], device=relevance.device)
    end = torch.tensor([e for _, e in spans], device=relevance.device)
    first = torch.tensor([s for s, _ in targets], device=relevance.device)[:, None]
    past = torch.tensor([e for _, e in targets], device=relevance.device)[:, None]
    shared = (torch.minimum(past, end) > torch.maximum(first, start)).float()
    count = shared.sum(1)
    return torch.where(count > 0, shared @ relevance / count.clamp_min(1), float("-inf"))


def raters(tokens: Tokens) -> Bool[Tensor, "b n"]:
    """The words behind the image that resemble it most (SparseVLM, arXiv 2410.04417): their share in the softmax over
    those words of image · textᵀ, mean over the image, is above the average. All of them, if none stands out.

    tokens  the input embeddings, before the first language layer
    """
    place = tokens.other_index
    behind = (place > tokens.visual_index.amax(1, keepdim=True)) & take(tokens.valid, place)
    image, text = tokens.of_visual(tokens.x).float(), take(tokens.x, place).float()
    share = (image @ text.transpose(1, 2)).masked_fill(~behind[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    real = tokens.of_visual(tokens.valid).float()
    share = (share * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)
    mean = share.sum(1, keepdim=True) / behind.sum(1, keepdim=True).clamp_min(1)
    chosen = behind & (share > mean)
    chosen = torch.where(chosen.any(1, keepdim=True), chosen, behind)
    return torch.zeros_like(tokens.valid).scatter(1, place, chosen)


WORDS = ("te_rt", "te", "rt", "all")
"""Choices of the words that make the pseudo CLS (the rows of the paper's Table 6, whose abbreviations it spells
out, but not how one works without the others; that is our reading):

te_rt  original text tokens + CLIP text encoder + relevance threshold: Eq. 8, those with a CLIP relevance ≥ τ
te     no threshold: all of them, weighed by their relevance to CLIP as far as it is positive
rt     no text encoder: those whose own LLM embedding has cosine ≥ τ with the projected visual CLS, the one vector of the
       image that lives in their space
all    original text tokens (OTT) alone: the mean of all of them
"""


def pseudo_cls(
    embeddings: Float[Tensor, "b n d"],
    relevance: Float[Tensor, "b n"],
    tau: float,
    fallback: Float[Tensor, "b d"],
    words: str = "te_rt",
) -> Float[Tensor, "b d"]:
    """Eq. 8: the mean LLM embedding of the tokens with relevance ≥ τ; where none passes, `fallback`.

    relevance  -inf for tokens outside the instruction. `words`: as in WORDS
    The paper falls back to the visual CLS; that it goes through the projector is our reading: it must have LLM width.
    """
    if words == "te":
        weight = relevance.clamp_min(0)
    else:
        weight = (relevance > float("-inf") if words == "all" else relevance >= tau).float()
    weight = weight.to(embeddings.dtype)
    total = weight.sum(1, keepdim=True)
    mean = (embeddings * weight[:, :, None]).sum(1) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, mean, fallback.to(embeddings.dtype))
