"""Trace of a prefill, and the merge of the traces of several groups of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ivtp.core.loop import Kept


@dataclass(frozen=True)
class Trace:
    """Tokens that each cut of the last prefill kept, and what was read out on the way.

    vision    one entry per cut in the tower: a row per image, or per crop of it; positions are patches (merge units) in it
    language  one entry per cut in the language model: a row per prompt; positions count its visual tokens, image after
              image. For one image without crops they are patches as well
    entered   visual tokens that reached the language model, in the same count
    visual    "b" number of visual tokens of each prompt
    early     logits "b vocabulary" read out at the end of part 1 through the final norm and the LM head
    words     per sample: (text, relevance) of every instruction token, when guidance was used
    Where images of one batch differ in size, rows are padded with tokens that are not valid.
    """

    vision: list[Kept] = field(default_factory=list)
    language: list[Kept] = field(default_factory=list)
    entered: Kept | None = None
    visual: Tensor | None = None
    early: Tensor | None = None
    words: list[list[tuple[str, float]] | None] | None = None

    @property
    def kept(self) -> Kept | None:
        """Visual tokens kept by the final cut, per prompt; None where nothing was cut."""
        if self.language:
            return self.language[-1]
        if not self.vision or self.entered is None:
            return None
        return replace(self.entered, layer=self.vision[-1].layer, after=self.vision[-1].after)


def merged(traces: Sequence[Trace], rows: Sequence[int], order: Tensor) -> Trace:
    """Merge the traces of several groups of `rows` prompts, whose rows, one group after another, come into `order`."""
    early = [trace.early for trace in traces if trace.early is not None]
    visual = [trace.visual for trace in traces if trace.visual is not None]
    entered = [trace.entered for trace in traces]
    words = None
    if any(trace.words is not None for trace in traces):
        words_of = [w for trace, n in zip(traces, rows, strict=True) for w in trace.words or [None] * n]
        words = [words_of[i] for i in order.tolist()]

    def cuts(of_traces: Sequence[list[Kept]]) -> list[Kept]:
        count = max(map(len, of_traces))
        return [together([cuts[i] if i < len(cuts) else None for cuts in of_traces], rows, order) for i in range(count)]

    return Trace(
        cuts([trace.vision for trace in traces]),
        cuts([trace.language for trace in traces]),
        together(entered, rows, order) if any(entered) else None,
        torch.cat(visual)[order.cpu()] if visual else None,
        torch.cat(early)[order] if early else None,
        words,
    )


def together(cuts: Sequence[Kept | None], rows: Sequence[int], order: Tensor) -> Kept:
    """Join the same cut of several groups; a group without it (no image) has only rows that are not valid."""
    known = next(cut for cut in cuts if cut is not None)
    empty = [known.position.new_zeros(n, 0) for n in rows]
    position = [e if cut is None else cut.position for cut, e in zip(cuts, empty, strict=True)]
    valid = [e.bool() if cut is None else cut.valid for cut, e in zip(cuts, empty, strict=True)]
    return replace(known, position=pad_left(position, 1)[order], valid=pad_left(valid, 1)[order])


def pad_left(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Concatenate parts along the first axis, with zeros on the left where they are shorter along `axis`."""
    longest = max(part.shape[axis] for part in parts)
    return torch.cat([nn.functional.pad(p, (0, 0) * (p.ndim - 1 - axis) + (longest - p.shape[axis], 0)) for p in parts])
