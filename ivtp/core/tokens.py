"""The token sequence and the one method that shortens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scalars = Float[Tensor, "b v"]
"""A number per visual token."""
Vectors = Float[Tensor, "b v d"]
"""A vector per visual token."""


@dataclass(frozen=True)
class Selection:
    """Visual tokens that stay, and the others that join them.

    index  position on the visual axis of each kept token, in the order in which they stay
    into   for every visual token the slot (0..k-1) it ends in, -1: nowhere; None: kept ones stay, the others go
    valid  False where a slot is only padding, for methods that keep a different number per sample; None: all real
    weight share of every visual token in each slot, for methods whose slots share tokens; None: as `into` says
    """

    index: Int[Tensor, "b k"]
    into: Int[Tensor, "b v"] | None = None
    valid: Bool[Tensor, "b k"] | None = None
    weight: Float[Tensor, "b k v"] | None = None


Change = Callable[[Tensor], Tensor]
"""A field "b n ..." → its visual part, or the field without the tokens that go."""
Place = Callable[[Tensor, Tensor], Tensor]
"""A field "b n ..." and new values of the kept tokens "b k ..." → the field without the tokens that go, with these values."""


@dataclass(frozen=True)
class Facts:
    """Statistics of a batch's masks as Python numbers, kept to avoid a GPU synchronisation per layer.

    visual  visual tokens per sample, padding included
    padded  False: no token is padding
    lone    True: every sample has exactly one reference token
    lead    tokens before the first visual one where the first of all is the reference (class token, registers), else 0
    start   place of the first visual token where they stand side by side from there in every sample; None: maybe nowhere
    """

    visual: int
    padded: bool = False
    lone: bool = True
    lead: int = 0
    start: int | None = None

    @classmethod
    def of(cls, valid: Bool[Tensor, "b n"], visual: Bool[Tensor, "b n"], reference: Bool[Tensor, "b n"]) -> Facts:
        """Read the statistics from the masks, at the price of one synchronisation."""
        first, number = visual[0].int().argmax(), visual[0].sum()
        lone = (reference.sum(1) == 1).all()
        place = torch.arange(visual.shape[1], device=visual.device)
        solid = (visual == ((place >= first) & (place < first + number))).all()
        facts = torch.stack([number, ~valid.all(), lone, first * reference[0, 0], first, solid])
        count, padded, one, lead, start, solid = facts.tolist()
        return cls(count, bool(padded), bool(one), lead, start if solid else None)


@dataclass(frozen=True)
class Tokens:
    """A batch of sequences on their way through a stack of layers.

    x          hidden states
    position   place in the unpruned sequence, counted from the first patch: of a visual token its place in the image
    size       how many original tokens each one stands for
    valid      False: padding, never attended to
    visual     True: may be pruned; every sample has the same number of them (padding included)
    reference  True: its attention scores the visual ones (CLS, pseudo CLS, last token); several are averaged
    sample     a number that belongs to the sample wherever it stands in a batch; seeds random choices
    feature    output of the stack, if that is not `x` (LLaVA reads an earlier layer than the last), or features still to
               be added (DeepStack)
    relevance  cosine of each visual token with the instruction, for methods that read it; for an oracle, 1 on the target
               patches, else 0
    state      `x` after the model's last norm, during a cut that reads it
    facts      statistics of `valid`, `visual` and `reference`; pass None when replacing one of these, to recompute them
    """

    x: Float[Tensor, "b n d"]
    position: Int[Tensor, "b n"]
    size: Float[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]
    visual: Bool[Tensor, "b n"]
    reference: Bool[Tensor, "b n"]
    sample: Int[Tensor, " b"]
    feature: Float[Tensor, "b n c"] | None = None
    relevance: Float[Tensor, "b n"] | None = None
    state: Float[Tensor, "b n d"] | None = None
    facts: Any = None  # given as None, and Facts from then on

    def __post_init__(self) -> None:
        if self.facts is None:
            object.__setattr__(self, "facts", Facts.of(self.valid, self.visual, self.reference))

    @classmethod
    def of(
        cls,
        x: Tensor,
        visual: Tensor,
        reference: Tensor,
        *,
        position: Tensor | None = None,
        valid: Tensor | None = None,
        sample: Tensor | None = None,
        facts: Facts | None = None,
    ) -> Tokens:
        """A fresh, unpruned sequence: every token stands for itself, at its own index.

        >>> from ivtp.core.reduces import Drop
        >>> visual = torch.tensor([[False, True, True, True]])  # a class token and three patches
        >>> tokens = Tokens.of(torch.zeros(1, 4, 8), visual, ~visual)
        >>> tokens.keep(Selection(torch.tensor([[0, 2]])), Drop(), None).position  # the first and the last patch stay
        tensor([[0, 1, 3]])
        """
        b, n, _ = x.shape
        if position is None:
            position = torch.arange(n, device=x.device).expand(b, n)
        if valid is None:
            valid = torch.ones(b, n, dtype=torch.bool, device=x.device)
        if sample is None:
            sample = torch.zeros(b, dtype=torch.long, device=x.device)
        size, visual, reference = torch.ones(b, n, device=x.device), visual.expand(b, n), reference.expand(b, n)
        return cls(x, position, size, valid, visual, reference, sample, facts=facts)

    @property
    def visual_count(self) -> int:
        """v: visual tokens per sample, padding included."""
        return self.facts.visual

    @property
    def visual_index(self) -> Int[Tensor, "b v"]:
        """Indices of the visual tokens, in sequence order."""
        return indices(self.visual, self.visual_count)

    @property
    def other_index(self) -> Int[Tensor, "b t"]:
        """Indices of the tokens that are not visual, in sequence order."""
        return indices(~self.visual, self.visual.shape[1] - self.visual_count)

    def of_visual(self, values: Tensor) -> Tensor:
        """The visual columns of `values` "b n ..." as "b v ..."; a view where they stand side by side."""
        start = self.facts.start
        return take(values, self.visual_index) if start is None else values[:, start : start + self.visual_count]

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens with new hidden states, and all other fields on their device."""
        if x.device == self.x.device:
            return replace(self, x=x)
        return self._each(lambda value: value.to(x.device), x=x)

    def keep(self, selection: Selection, reduce: Callable[..., tuple[Tensor, Tensor]], scores: Any) -> Tokens:
        """Shorten the sequence to the selected visual tokens; all others stay, in place.

        This is the only place where a sequence changes length by pruning: every field is rewritten together.
        """
        apart = self.facts.start is None
        visual, shortened, placed = self._apart(selection) if apart else self._side_by_side(selection)
        sizes = visual(self.size)

        def reduced(values: Tensor) -> tuple[Tensor, Tensor]:
            return reduce(visual(values), sizes, scores, selection)

        x, size = reduced(self.x)
        valid = shortened(self.valid)
        if selection.valid is not None:
            valid = placed(self.valid, take(visual(self.valid), selection.index) & selection.valid)
        padded = self.facts.padded or selection.valid is not None
        return self._each(
            shortened,
            x=placed(self.x, x),
            size=placed(self.size, size),
            valid=valid,
            sample=self.sample,
            feature=None if self.feature is None else placed(self.feature, reduced(self.feature)[0]),
            state=None,
            facts=replace(self.facts, visual=selection.index.shape[1], padded=padded),
        )

    def _apart(self, selection: Selection) -> tuple[Change, Change, Place]:
        """Functions that take the visual part of a field, shorten it, and put new values of the kept tokens in place, wherever
        visual tokens stand."""
        visual, others = self.visual_index, self.other_index
        kept = take(visual, selection.index)
        # Text and separators may stand between visual tokens, so kept tokens take the sorted places of the kept ones. A
        # selection in another order fills those places in its order.
        order = torch.cat([others, kept.sort(dim=1).values], 1).argsort(dim=1, stable=True)
        source = torch.cat([others, kept], 1).gather(1, order)

        def placed(values: Tensor, kept: Tensor) -> Tensor:
            return take(torch.cat([take(values, others), kept.to(values.dtype)], 1), order)

        return lambda values: take(values, visual), lambda values: take(values, source), placed

    def _side_by_side(self, selection: Selection) -> tuple[Change, Change, Place]:
        """The same where visual tokens stand side by side: no place needs to be looked for, which on a GPU takes longer than
        to move the tokens."""
        start, end = self.facts.start, self.facts.start + self.visual_count

        def placed(values: Tensor, kept: Tensor) -> Tensor:
            return torch.cat([values[:, :start], kept.to(values.dtype), values[:, end:]], 1)

        visual = self.of_visual
        return visual, lambda values: placed(values, take(visual(values), selection.index)), placed

    def samples(self, index: Int[Tensor, " c"]) -> Tokens:
        """The sequences of the batch at `index`, repeated or reordered."""
        return self._each(lambda value: value[index])

    @classmethod
    def together(cls, parts: Sequence[Tokens]) -> Tokens:
        """Sequences of one length and with as many visual tokens, as one batch."""
        each = [part.facts for part in parts]
        facts = replace(
            each[0],
            padded=any(facts.padded for facts in each),
            lone=all(facts.lone for facts in each),
            start=each[0].start if len({facts.start for facts in each}) == 1 else None,
        )
        fields: dict[str, Any] = {
            name: None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
            for name in FIELDS
            if name != "facts"
        }
        return cls(**fields, facts=facts)

    def append(self, x: Float[Tensor, "b d"]) -> Tokens:
        """Add one token at the end, one position after the last, as the only reference token."""
        one = torch.ones_like(self.valid[:, :1])
        return self._each(
            lambda values: torch.cat([values, torch.zeros_like(values[:, :1])], 1),
            x=torch.cat([self.x, x[:, None].to(self.x.dtype)], 1),
            position=torch.cat([self.position, self.position[:, -1:] + 1], 1),
            size=torch.cat([self.size, torch.ones_like(self.size[:, :1])], 1),
            valid=torch.cat([self.valid, one], 1),
            reference=torch.cat([torch.zeros_like(self.reference), one], 1),
            sample=self.sample,
            facts=replace(self.facts, lone=True, lead=0),
        )

    def without_last(self) -> Tokens:
        """Remove the appended token; the last remaining token is the reference from here on."""
        reference = torch.zeros_like(self.reference[:, :-1])
        reference[:, -1] = True
        facts = replace(self.facts, lone=True, lead=0)
        return self._each(lambda values: values[:, :-1], reference=reference, sample=self.sample, facts=facts)

    def _each(self, change: Callable[[Tensor], Tensor], **fields: Any) -> Tokens:
        """The tokens with these fields, and with every other tensor changed, in a way that leaves the facts true."""
        for name in FIELDS:  # not vars(self): the compiler of torch 2.11 cannot follow it
            if name not in fields:
                value = getattr(self, name)
                fields[name] = change(value) if isinstance(value, Tensor) else value
        return Tokens(**fields)


FIELDS = tuple(field.name for field in fields(Tokens))


def indices(mask: Bool[Tensor, "b n"], count: int) -> Int[Tensor, "b k"]:
    """First `count` places where the mask holds, in order; where fewer do, then those where it does not.

    The number is given, so that nothing synchronises: a stable sort brings the places to the front.
    """
    return torch.argsort((~mask).byte(), dim=1, stable=True)[:, :count]


def take(values: Tensor, index: Int[Tensor, "b k"]) -> Tensor:
    """Gather along the token axis: `values` "b n ..." at `index` "b k" gives "b k ...", a token's vector at a time."""
    if values.ndim == 2:
        return values.gather(1, index)
    if not values.is_contiguous():  # part of a sequence: side by side it would have to be copied
        return values[torch.arange(len(index), device=index.device)[:, None], index]
    return values.flatten(0, 1).index_select(0, flat(index, values.shape[1])).unflatten(0, index.shape)


def put(values: Float[Tensor, "b n d"], index: Int[Tensor, "b k"], new: Float[Tensor, "b k d"]) -> Tensor:
    """`values` with the rows at `index` replaced."""
    rows = flat(index, values.shape[1])
    return values.flatten(0, 1).index_copy(0, rows, new.to(values.dtype).flatten(0, 1)).view_as(values)


def flat(index: Int[Tensor, "b k"], n: int) -> Int[Tensor, " r"]:
    """Places "b k" in sequences of `n` tokens as places among the tokens of the whole batch."""
    return (index + n * torch.arange(len(index), device=index.device)[:, None]).flatten()
