"""Schedules: where tokens leave and how many stay; a tuple of cuts, fixed before the first image."""

from __future__ import annotations

from dataclasses import dataclass

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
        if self.after not in PLACES:
            raise ValueError(f"after={self.after!r} is not one of {', '.join(PLACES)}")
        if self.layer < 0 and self.after == "attn":
            raise ValueError(f"layer={self.layer} is before the first layer, which has no attention; use after='block'")


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


def check(cuts: tuple[Cut, ...], tokens: int, depth: int, site: str) -> None:
    """Refuse a schedule that cannot be carried out: tokens that are not there, layers that do not exist."""
    before, last = tokens, None
    for cut in cuts:
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
            raise ValueError(f"cuts must be in order, but {site} layer {cut.layer} ({cut.after}) comes after {last[0]}")
        before, last = cut.keep, place
