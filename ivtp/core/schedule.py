"""Schedules: where tokens leave and how many stay, fixed before the first image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ivtp.registry import check_choice

PLACES = ("attn", "block")


@dataclass(frozen=True)
class Cut:
    """After `layer` (0-based; -1: before the first), `keep` visual tokens stay.

    after  "attn": after attention and residual, before the FFN (IVTP, Fig. 2); "block": after the whole layer
    """

    layer: int
    keep: int
    after: str = "attn"

    def __post_init__(self) -> None:
        check_choice("after", self.after, PLACES)
        if self.layer < 0 and self.after == "attn":
            raise ValueError(f"layer={self.layer} is before the first layer, which has no attention; use after='block'")


class Step(NamedTuple):
    """One layer of a walk: its cuts, and the visual tokens before, between and behind them."""

    layer: int
    before_ffn: Cut | None
    behind: Cut | None
    entering: int
    in_ffn: int
    leaving: int


@dataclass(frozen=True)
class Schedule:
    """The cuts of one stage, in order."""

    cuts: tuple[Cut, ...] = ()

    @classmethod
    def at(cls, layers: Sequence[int], counts: Sequence[int], after: str = "attn") -> Schedule:
        """One cut at each of the layers, down to each of the counts.

        >>> Schedule.at([2, 5], [333, 192]).final(576)
        192
        """
        return cls(tuple(Cut(layer, count, after) for layer, count in zip(layers, counts, strict=True)))

    def __iter__(self) -> Iterator[Cut]:
        return iter(self.cuts)

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> Cut:
        return self.cuts[index]

    @property
    def first(self) -> Cut | None:
        """The cut before the first layer."""
        return self.cuts[0] if self.cuts and self.cuts[0].layer < 0 else None

    def walk(self, depth: int, tokens: int) -> list[Step]:
        """The layers of a stack that `tokens` visual tokens reach, with their cuts; `first` comes before them."""
        cuts = {(cut.layer, cut.after): cut for cut in self.cuts}
        steps, leaving = [], self.first.keep if self.first else tokens
        for layer in range(depth):
            before_ffn, behind, entering = cuts.get((layer, "attn")), cuts.get((layer, "block")), leaving
            in_ffn = before_ffn.keep if before_ffn else entering
            leaving = behind.keep if behind else in_ffn
            steps.append(Step(layer, before_ffn, behind, entering, in_ffn, leaving))
        return steps

    def reach(self, read: int) -> tuple[int, int]:
        """Leading layers whose attention, and those whose FFN, is run: as many as are read behind the stack, and those that
        the last cut needs.

        >>> Schedule.at([2, 5], [333, 192]).reach(5)
        (6, 5)
        """
        if not self.cuts:
            return read, read
        last = self.cuts[-1]
        return max(read, last.layer + 1), max(read, last.layer + (last.after == "block"))

    def final(self, tokens: int) -> int:
        """Visual tokens behind the last cut, of so many that reach the first."""
        return self.cuts[-1].keep if self.cuts else tokens

    def shortens(self, tokens: int) -> bool:
        """True where any of so many visual tokens leave."""
        return any(cut.keep < tokens for cut in self.cuts)

    def keeping(self, counts: Sequence[int]) -> Schedule:
        """The same places with other counts."""
        return Schedule(tuple(replace(cut, keep=count) for cut, count in zip(self.cuts, counts, strict=True)))

    def check(self, tokens: int, depth: int, site: str) -> None:
        """Refuse what cannot be carried out: tokens that are not there, layers that do not exist."""
        before, last = tokens, None
        for cut in self.cuts:
            if cut.keep < 1:
                raise ValueError(f"keep={cut.keep} at {site} layer {cut.layer}: at least 1 visual token must stay")
            if cut.keep > before:
                raise ValueError(
                    f"keep={cut.keep}, but only {before} visual tokens reach {site} layer {cut.layer}; keep at most {before}"
                )
            if not -1 <= cut.layer < depth:
                raise ValueError(f"layer={cut.layer} does not exist: the {site} stack has layers 0 to {depth - 1}")
            place = (cut.layer, PLACES.index(cut.after))
            if last is not None and place <= last:
                raise ValueError(
                    f"cuts must be in order, but {site} layer {cut.layer} ({cut.after}) comes after {last[0]}"
                )
            before, last = cut.keep, place

    def check_needs(self, needs: str | tuple[int, ...]) -> None:
        """Refuse cuts at which the attentions that the choices read (`Choice.needs`) do not exist."""
        if needs == "next" and not all(cut.after == "block" for cut in self.cuts):
            raise ValueError("the next layer's attention is asked for after a whole layer: use after='block'")
        if needs in ("group", "last"):
            layers = [cut.layer for cut in self.cuts]
            for before, layer in zip([-1, *layers], layers, strict=False):
                if layer == before:
                    raise ValueError(
                        f"the cut at layer {layer} has seen no attention "
                        + ("yet" if layer < 0 else "since the one before it")
                        + ", which its score or metric reads; cut in a later layer"
                    )


def equal_ratio(tokens: int, keep: float, cuts: int) -> list[int]:
    """Visual tokens after each of `cuts` cuts of equal keep ratio, from `tokens` down to `keep`.

    >>> equal_ratio(576, 64, 4)
    [333, 192, 111, 64]
    """
    return [round(tokens * (keep / tokens) ** (i / cuts)) for i in range(1, cuts + 1)]


def group_ends(layers: int, group: int | str) -> list[int]:
    """The last layer of every whole group of `group` layers ("all": one group) among the first `layers`.

    >>> group_ends(12, 3)
    [2, 5, 8, 11]
    >>> group_ends(12, "all")
    [11]
    """
    if group == "all":
        group = layers
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"group={group!r} must be a positive number of layers or 'all'")
    if group > layers:
        raise ValueError(f"group={group} is larger than the stack: only {layers} layers are grouped; use at most that")
    return list(range(group - 1, layers, group))
