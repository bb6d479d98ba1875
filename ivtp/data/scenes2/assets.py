"""Image assets of `scenes2`: sheets of 64-pixel sprites, panoramas, glyphs, and the index that names them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "scenes2"
EMOJI = ("noto", "noto-v1", "fluent-flat", "fluent-3d", "emojione")
"""Styles of the splits train, validation and test, beside the furniture renders."""
SPLITS = ("train", "validation", "test", "style", "wild")
SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""Range of view directions in a panorama per split, as fractions of the full turn."""


@dataclass(frozen=True)
class Concept:
    """Kind of object: canonical name, synonyms, hypernyms (narrow first), themes, and cells by sheet."""

    name: str
    synonyms: tuple[str, ...]
    hypernyms: tuple[str, ...]
    themes: tuple[str, ...]
    views: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Panorama: file row, names, indoors or outdoors, concepts that the photograph itself shows, and first split."""

    row: int
    name: str
    place: str
    where: str
    shows: frozenset[str]
    split: str


@cache
def _index() -> dict:
    return json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))


@cache
def concepts() -> dict[str, Concept]:
    """Concepts by name."""
    return {
        row["name"]: Concept(
            row["name"],
            tuple(row["synonyms"]),
            tuple(row["hypernyms"]),
            tuple(row["themes"]),
            {sheet: tuple(cells) for sheet, cells in row["views"].items()},
        )
        for row in _index()["concepts"]
    }


@cache
def places(split: str) -> tuple[Place, ...]:
    """Panoramas of a split: three are reserved for test, style and wild, which use the others from new directions too."""
    rows = [
        Place(i, row["name"], row["place"], row["where"], frozenset(row["shows"]), row["split"])
        for i, row in enumerate(_index()["places"])
    ]
    return tuple(place for place in rows if place.split == "train" or split not in ("train", "validation"))


@cache
def views(name: str, split: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Sheets and cells from which a split draws a concept.

    A furniture render that is one of several belongs to one split: the first to test, the second of three or more to
    validation, the others to train (and, where there are two, to validation).
    """
    sheets = concepts()[name].views
    if split == "style":
        return (("twemoji", sheets["twemoji"]),) if "twemoji" in sheets else ()
    if split == "wild":
        return (("wild", sheets["wild"]),) if "wild" in sheets else ()
    styles = [(style, sheets[style]) for style in EMOJI if style in sheets]
    cells = sheets.get("furniture", ())
    if len(cells) >= 3:
        cells = {"test": cells[:1], "validation": cells[1:2], "train": cells[2:]}[split]
    elif len(cells) == 2:
        cells = cells[:1] if split == "test" else cells[1:]
    return (*styles, *([("furniture", cells)] if cells else []))


@cache
def _sheet(name: str) -> Image.Image:
    with Image.open(FOLDER / f"{name}.webp") as image:
        return image.convert("RGBA")


@cache
def sprite(sheet: str, cell: int) -> Image.Image:
    """Drawing of a concept with premultiplied alpha ("RGBa"), cropped to its opaque part."""
    index = _index()
    side, (row, column) = index["cell"], divmod(cell, index["columns"])
    image = _sheet(sheet).crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
    return image.crop(image.getchannel("A").getbbox()).convert("RGBa")


@cache
def panorama(row: int) -> Image.Image:
    """One photograph, extended to the right by its own left half so that any crop lies inside."""
    with Image.open(FOLDER / "panoramas.webp") as image:
        stack = image.convert("RGB")
    width, height = stack.width, stack.width // 2
    photo = stack.crop((0, row * height, width, (row + 1) * height))
    wide = Image.new("RGB", (width * 3 // 2, height))
    wide.paste(photo, (0, 0))
    wide.paste(photo.crop((0, 0, width // 2, height)), (width, 0))
    return wide


def fonts(split: str) -> tuple[str, ...]:
    """Names of the fonts of a split's signs."""
    return tuple(_index()["glyphs"]["splits"].get(split, _index()["glyphs"]["splits"]["test"]))


@cache
def _atlas() -> np.ndarray:
    with Image.open(FOLDER / "glyphs.png") as image:
        return np.asarray(image.convert("L"))


def lettering(text: str, font: str) -> np.ndarray:
    """Opacity of a line of text, 40 pixels high."""
    glyphs = _index()["glyphs"]
    height, entry = glyphs["height"], glyphs["fonts"][font]
    columns = [glyphs["characters"].index(character) for character in text]
    widths = [entry["widths"][column] for column in columns]
    line = np.zeros((height, sum(widths) + height), np.uint8)
    left = height // 2
    for column, width in zip(columns, widths, strict=True):
        start = left + (width - height) // 2
        cell = _atlas()[entry["row"] * height : (entry["row"] + 1) * height, column * height : (column + 1) * height]
        window = line[:, start : start + height]
        np.maximum(window, cell[:, : window.shape[1]], out=window)
        left += width
    inked = np.flatnonzero(line.any(0))
    return line[:, inked[0] : inked[-1] + 1]
