"""Compose a scene before it is drawn: place, theme, objects and signs, their sizes and colours."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ivtp.data.scenes2 import words
from ivtp.data.scenes2.assets import SHARES, Place, concepts, fonts, places, views

TIERS = {"small": (18, 25), "medium": (25, 40), "large": (40, 64)}
"""Longer side of an object in pixels."""
TIER_SHARES = (0.4, 0.4, 0.2)
OBJECTS = {144: (6, 9), 192: (8, 14)}
"""Side of an image in pixels → least and largest number of objects on it."""
_FOCUS = 0.85  # scenes with two to four objects of one hypernym, or there would be little to count
_THEMED = 0.6
_TINTED = 0.55  # of the objects that come in any colour; about a third of all
_TWINS = 0.2  # chance that an object repeats an earlier concept
_RARE = 60.0  # the larger, the more evenly concepts are drawn


@dataclass(frozen=True)
class Draft:
    """Object to draw: concept, tint ("" for the sprite's own colours), sheet and cell, longer side in pixels."""

    concept: str
    tint: str
    sheet: str
    cell: int
    side: float
    tier: str


@dataclass(frozen=True)
class SignDraft:
    """Sign to draw; its kind is word, number or price."""

    text: str
    kind: str
    color: str
    font: str
    height: float


@dataclass(frozen=True)
class Layout:
    """Contents of a scene; `camera` is yaw, pitch, angle of view, mirrored."""

    place: Place
    camera: tuple[float, float, float, bool]
    theme: str
    objects: tuple[Draft, ...]
    signs: tuple[SignDraft, ...]


def pick(rng: np.random.Generator, options, weights=None):
    """Draw one option, by `rng.random` alone: numpy guarantees that stream across versions."""
    if weights is None:
        return options[int(rng.random() * len(options))]
    ladder = np.cumsum(weights)
    return options[min(int(np.searchsorted(ladder, rng.random() * ladder[-1], side="right")), len(options) - 1)]


@cache
def popularity() -> dict[str, float]:
    """Frequency of each concept, Zipf-like over a fixed order."""
    order = np.argsort(np.random.default_rng(1706).random(len(concepts())))
    return {name: 1 / (rank / _RARE + 1) for name, rank in zip(concepts(), np.argsort(order).tolist(), strict=True)}


@cache
def drawable(split: str) -> tuple[str, ...]:
    """Concepts that a split has drawings of."""
    return tuple(name for name in concepts() if views(name, split))


@cache
def _pools(split: str) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Drawable concepts by theme and by hypernym."""
    by_theme: dict[str, list[str]] = {}
    by_hypernym: dict[str, list[str]] = {}
    for name in drawable(split):
        for theme in concepts()[name].themes:
            by_theme.setdefault(theme, []).append(name)
        for hypernym in set(concepts()[name].hypernyms) - words.NOT_ASKED:
            by_hypernym.setdefault(hypernym, []).append(name)
    least = 5 if split == "wild" else 8
    themes = {theme: tuple(names) for theme, names in sorted(by_theme.items()) if len(names) >= least}
    return themes, {h: tuple(names) for h, names in sorted(by_hypernym.items()) if len(names) >= 2}


def _draw_concept(rng: np.random.Generator, names, banned: frozenset[str]) -> str | None:
    names = [name for name in names if name not in banned]
    return pick(rng, names, [popularity()[name] for name in names]) if names else None


def _concepts(rng: np.random.Generator, split: str, count: int, theme: str, banned: frozenset[str]) -> list[str]:
    themes, hypernyms = _pools(split)
    chosen: list[str] = []
    if rng.random() < _FOCUS:
        focus = pick(rng, list(hypernyms))
        for _ in range(pick(rng, (2, 3, 4), (0.3, 0.33, 0.37))):
            again = chosen and rng.random() < _TWINS
            name = pick(rng, chosen) if again else _draw_concept(rng, hypernyms[focus], banned | frozenset(chosen))
            chosen += [name] if name else []
    while len(chosen) < count:
        if chosen and rng.random() < _TWINS / 3:
            chosen.append(pick(rng, chosen))
            continue
        pool = themes[theme] if rng.random() < _THEMED else drawable(split)
        name = _draw_concept(rng, pool, banned | frozenset(chosen)) or _draw_concept(rng, drawable(split), banned)
        assert name is not None, "a place shows every concept of its split"
        chosen.append(name)
    return chosen[:count]


def _signs(rng: np.random.Generator, split: str) -> list[SignDraft]:
    kinds, colors = ["word", "word", "number", "price"], list(words.SIGN_COLORS)
    signs = []
    for _ in range(pick(rng, (1, 2, 3))):
        kind, color = pick(rng, kinds), pick(rng, colors)
        kinds.remove(kind)
        colors.remove(color)
        text = pick(rng, {"word": words.SIGN_WORDS, "number": words.NUMBERS, "price": words.PRICES}[kind])
        signs.append(SignDraft(text, kind, color, pick(rng, fonts(split)), 17 + 9 * rng.random()))
    return signs


def compose(rng: np.random.Generator, split: str, size: int) -> Layout:
    """Draw a random layout."""
    place = pick(rng, places(split))
    whole = place.split != "train" or split in ("style", "wild")  # a photograph of these splits alone
    start, stop = (0.0, 1.0) if place.split != "train" else SHARES["test" if whole else split]
    view = 0.14 + 0.05 * rng.random()  # of the full turn: about 50 to 68 degrees
    yaw = start + (stop - start - (0 if stop - start == 1 else view)) * rng.random()
    pitch = (rng.random() - 0.5) * 0.24
    camera = (yaw, pitch, view, bool(rng.random() < 0.5))
    theme = pick(rng, list(_pools(split)[0]))
    low, high = OBJECTS[size]
    count = low + int(rng.random() * (high - low + 1))
    objects = []
    for name in _concepts(rng, split, count, theme, place.shows):
        sheet, cells = pick(rng, views(name, split))
        tint = pick(rng, words.COLORS) if words.any_color(name) and rng.random() < _TINTED else ""
        tier = pick(rng, tuple(TIERS), TIER_SHARES)
        least, most = TIERS[tier]
        side = least + (most - least) * rng.random()
        objects.append(Draft(name, tint, sheet, pick(rng, cells), side, tier))
    objects.sort(key=lambda draft: -draft.side)  # the large ones find room first, and lie behind
    return Layout(place, camera, theme, tuple(objects), tuple(_signs(rng, split)))
