"""The token sequence and the one method that shortens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Which visual tokens stay, and which of the others join them.

    index  position on the visual axis of each kept token, in the order in which they stay
    into   for every visual token the slot (0..k-1) it ends in, -1: nowhere; None: kept ones stay, the others go
    valid  False where a slot is only padding, for methods that keep a different number per sample; None: all real
    weight what of every visual token goes into each slot, for methods whose slots share tokens; None: `into` tells
    """

    index: Int[Tensor, "b k"]
    into: Int[Tensor, "b v"] | None = None
    valid: Bool[Tensor, "b k"] | None = None
    weight: Float[Tensor, "b k v"] | None = None


@dataclass(frozen=True)
class Facts:
    """What is asked of a batch's masks at every layer, as plain numbers: each time it is asked a GPU, all wait.

    visual  visual tokens per sample, padding included
    padded  False: no token is padding
    lone    True: every sample has exactly one reference token
    lead    tokens before the first visual one where the first of all refers (class token, registers), else 0
    """

    visual: int
    padded: bool = False
    lone: bool = True
    lead: int = 0

    @classmethod
    def of(cls, valid: Bool[Tensor, "b n"], visual: Bool[Tensor, "b n"], reference: Bool[Tensor, "b n"]) -> Facts:
        """As found in the masks, at the price of waiting once."""
        lead = visual[0].int().argmax() * reference[0, 0]
        lone = (reference.sum(1) == 1).all()
        count, padded, one, before = torch.stack([visual[0].sum(), ~valid.all(), lone, lead]).tolist()
        return cls(count, bool(padded), bool(one), before)


@dataclass(frozen=True)
class Tokens:
    """A batch of sequences on their way through a stack of layers.

    x          hidden states
    position   place in the unpruned sequence, counted from the first patch: of a visual token its place in the image
    size       how many original tokens each one stands for
    valid      False: padding, never attended to
    visual     True: may be pruned; every sample has the same number of them (padding included)
    reference  True: its attention judges the visual ones (CLS, pseudo CLS, last token); several are averaged
    sample     a number that belongs to the sample wherever it stands in a batch; seeds random choices
    feature    what leaves the stack, if that is not `x` (LLaVA reads an earlier layer than the last), or is still to be
               added (DeepStack)
    relevance  cosine of each visual token with the instruction, for methods that ask for it; for an oracle, 1 on what
               the question is about, else 0
    state      `x` after the model's last norm, there during a cut of a method that asks for it
    facts      what is known of `valid`, `visual` and `reference`; who replaces one of these gives None, and it is found
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
    facts: Facts | None = None

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

        >>> from ivtp.pruning.reduces import drop
        >>> visual = torch.tensor([[False, True, True, True]])  # a class token and three patches
        >>> tokens = Tokens.of(torch.zeros(1, 4, 8), visual, ~visual)
        >>> tokens.keep(Selection(torch.tensor([[0, 2]])), drop, None).position  # the first and the last patch stay
        tensor([[0, 1, 3]])
        """
        b, n, _ = x.shape
        if position is None:
            position = torch.arange(n, device=x.device).expand(b, n)
        if valid is None:
            valid = torch.ones(b, n, dtype=torch.bool, device=x.device)
        if sample is None:
            sample = torch.zeros(b, dtype=torch.long, device=x.device)
        size = torch.ones(b, n, device=x.device)
        return cls(x, position, size, valid, visual.expand(b, n), reference.expand(b, n), sample, facts=facts)

    @property
    def visual_count(self) -> int:
        """v: visual tokens per sample, padding included."""
        return self.facts.visual

    @property
    def visual_index(self) -> Int[Tensor, "b v"]:
        """Where the visual tokens stand, in sequence order."""
        # A stable sort by "not visual" brings them to the front: how many there are is known, so nothing waits.
        return torch.argsort((~self.visual).byte(), dim=1, stable=True)[:, : self.visual_count]

    def of_visual(self, values: Tensor) -> Tensor:
        """The visual columns of `values` "b n ..." as "b v ..."."""
        return take(values, self.visual_index)

    def with_x(self, x: Tensor) -> Tokens:
        """New hidden states; where a layer lies on another device, all goes there with them."""
        if x.device == self.x.device:
            return replace(self, x=x)
        return self._each(lambda value: value.to(x.device), x=x)

    def keep(self, selection: Selection, reduce, scores: Tensor | None) -> Tokens:
        """Shorten the sequence to the selected visual tokens; all others stay, in place.

        This is the only place where a sequence changes length by pruning: every field is rewritten together.
        """
        visual_index = self.visual_index
        v = visual_index.shape[1]
        kept = take(visual_index, selection.index)

        # What stays keeps its order among the others, between whose visual tokens text or separators may stand. A method
        # that asks for another order of the kept ones gets it: they share out the places among themselves.
        others = torch.argsort(self.visual.byte(), dim=1, stable=True)[:, : self.x.shape[1] - v]
        order = torch.cat([others, kept.sort(dim=1).values], 1).argsort(dim=1, stable=True)
        source = torch.cat([others, kept], 1).gather(1, order)
        slot = order.argsort(dim=1)[:, others.shape[1] :]

        x, size = reduce(take(self.x, visual_index), take(self.size, visual_index), scores, selection)
        feature = None
        if self.feature is not None:
            reduced, _ = reduce(take(self.feature, visual_index), take(self.size, visual_index), scores, selection)
            feature = put(take(self.feature, source), slot, reduced)
        valid = take(self.valid, source)
        if selection.valid is not None:
            valid = valid.scatter(1, slot, take(valid, slot) & selection.valid)
        return Tokens(
            x=put(take(self.x, source), slot, x),
            position=take(self.position, source),
            size=take(self.size, source).scatter(1, slot, size),
            valid=valid,
            visual=take(self.visual, source),
            reference=take(self.reference, source),
            sample=self.sample,
            feature=feature,
            relevance=None if self.relevance is None else take(self.relevance, source),
            facts=replace(
                self.facts,
                visual=selection.index.shape[1],
                padded=self.facts.padded or selection.valid is not None,
            ),
        )

    def samples(self, index: Int[Tensor, " c"]) -> Tokens:
        """The sequences of the batch at `index`, repeated or reordered."""
        return self._each(lambda value: value[index])

    @classmethod
    def together(cls, parts: Sequence[Tokens]) -> Tokens:
        """Sequences of one length and with as many visual tokens, as one batch."""
        known = [part.facts for part in parts]
        facts = replace(known[0], padded=any(facts.padded for facts in known), lone=all(facts.lone for facts in known))
        fields = {
            name: None if value is None else torch.cat([getattr(part, name) for part in parts])
            for name, value in vars(parts[0]).items()
            if name != "facts"
        }
        return cls(**fields, facts=facts)

    def _each(self, change: Callable[[Tensor], Tensor], **given: Tensor) -> Tokens:
        """Every tensor changed in a way that leaves the facts true, but those that are given."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in given}
        changed = {name: change(value) if isinstance(value, Tensor) else value for name, value in fields.items()}
        return Tokens(**given, **changed)

    def append(self, x: Float[Tensor, "b d"]) -> Tokens:
        """Add one reference token at the end, as the only one that judges, one position after the last."""
        one = torch.ones_like(self.valid[:, :1])
        feature = self.feature
        if feature is not None:
            feature = torch.cat([feature, torch.zeros_like(feature[:, :1])], 1)
        return Tokens(
            x=torch.cat([self.x, x[:, None].to(self.x.dtype)], 1),
            position=torch.cat([self.position, self.position[:, -1:] + 1], 1),
            size=torch.cat([self.size, torch.ones_like(self.size[:, :1])], 1),
            valid=torch.cat([self.valid, one], 1),
            visual=torch.cat([self.visual, ~one], 1),
            reference=torch.cat([torch.zeros_like(self.reference), one], 1),
            sample=self.sample,
            feature=feature,
            facts=replace(self.facts, lone=True, lead=0),
        )

    def without_last(self) -> Tokens:
        """Take the appended token away again; the last remaining token is the reference from here on."""
        reference = torch.zeros_like(self.reference[:, :-1])
        reference[:, -1] = True
        return Tokens(
            self.x[:, :-1],
            self.position[:, :-1],
            self.size[:, :-1],
            self.valid[:, :-1],
            self.visual[:, :-1],
            reference,
            self.sample,
            None if self.feature is None else self.feature[:, :-1],
            facts=replace(self.facts, lone=True, lead=0),
        )


def take(values: Tensor, index: Int[Tensor, "b k"]) -> Tensor:
    """Gather along the token axis: `values` "b n ..." at `index` "b k" gives "b k ..."."""
    if values.ndim == 2:
        return values.gather(1, index)
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def put(values: Float[Tensor, "b n d"], index: Int[Tensor, "b k"], new: Float[Tensor, "b k d"]) -> Tensor:
    """`values` with the rows at `index` replaced."""
    return values.scatter(1, index[:, :, None].expand_as(new), new.to(values.dtype))
