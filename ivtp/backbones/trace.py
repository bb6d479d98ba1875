"""What happened in a prefill, and how that of several groups of prompts becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ivtp.pruning.traverse import Kept


@dataclass(frozen=True)
class Trace:
    """What happened in the last prefill.

    vision    one entry per cut in the tower: a row per image, or per crop of it; positions are patches (merge units) in it
    language  one entry per cut in the language model: a row per prompt; positions count its visual tokens, image after
              image. For one image without crops they are patches as well
    entered   which visual tokens reached the language model, in the same count
    visual    "b" how many visual tokens each prompt had
    early     logits "b vocabulary" read out at the end of part 1 through the final norm and the LM head
    words     per sample: (text, relevance) of every instruction token, when guidance was used
    Where images of one batch have other sizes, rows are filled up with what is not valid.
    """

    vision: list[Kept] = field(default_factory=list)
    language: list[Kept] = field(default_factory=list)
    entered: Kept | None = None
    visual: Tensor | None = None
    early: Tensor | None = None
    words: list[list[tuple[str, float]] | None] | None = None

    @property
    def kept(self) -> Kept | None:
        """What the last cut of all left of each prompt; None where nothing was cut."""
        if self.language:
            return self.language[-1]
        return replace(self.entered, layer=self.vision[-1].layer, after=self.vision[-1].after) if self.vision else None


def merged(traces: Sequence[Trace], rows: Sequence[int], order: Tensor) -> Trace:
    """One trace of several groups of so many rows, which one after another come into `order`."""
    early = None if traces[0].early is None else torch.cat([trace.early for trace in traces])[order]
    words = None
    if any(trace.words is not None for trace in traces):
        spelled = [w for trace, n in zip(traces, rows, strict=True) for w in trace.words or [None] * n]
        words = [spelled[i] for i in order.tolist()]

    def cuts(site: str) -> list[Kept]:
        count = max(len(getattr(trace, site)) for trace in traces)
        return [together([(getattr(t, site) + [None] * count)[i] for t in traces], rows, order) for i in range(count)]

    entered = [trace.entered for trace in traces]
    return Trace(
        cuts("vision"),
        cuts("language"),
        together(entered, rows, order) if any(e is not None for e in entered) else None,
        None if traces[0].visual is None else torch.cat([trace.visual for trace in traces])[order.cpu()],
        early,
        words,
    )


def together(cuts: Sequence[Kept | None], rows: Sequence[int], order: Tensor) -> Kept:
    """The same cut in several groups; one that has none (no image) has only rows that are not valid."""
    known = next(cut for cut in cuts if cut is not None)
    empty = [known.position.new_zeros(n, 0) for n in rows]
    position = [e if cut is None else cut.position for cut, e in zip(cuts, empty, strict=True)]
    valid = [e.bool() if cut is None else cut.valid for cut, e in zip(cuts, empty, strict=True)]
    return replace(known, position=pad_left(position, 1)[order], valid=pad_left(valid, 1)[order])


def pad_left(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Parts of different lengths along `axis`, zeros before the shorter ones, behind one another in the first axis."""
    longest = max(part.shape[axis] for part in parts)
    padded = []
    for part in parts:
        shape = list(part.shape)
        shape[axis] = longest - shape[axis]
        padded.append(torch.cat([part.new_zeros(shape), part], axis))
    return torch.cat(padded)
