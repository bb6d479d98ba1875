"""Draw a layout: background, shadows, objects, signs, and the visible pixels of each of them."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ivtp.data.scenes2 import words
from ivtp.data.scenes2.assets import Place, concepts, lettering, panorama, sprite
from ivtp.data.scenes2.layout import Draft, Layout, SignDraft

PATCH = 8
VISIBLE = 0.8
"""Least fraction of an object's pixels that others leave uncovered."""
_TRIES = 40
_LEAST_SHARE = 1 / 16  # of a patch that an object fills, for the patch to count as showing it
_UPRIGHT = frozenset({"stop sign", "calendar", "keyboard", "dice", "stopwatch", "pool ball", "slot machine", "ruler"})
# Mean hue, saturation and brightness (of 255) that a tint gives the main colour.
_TINTS = {
    "red": (0, 205, 200),
    "orange": (17, 215, 235),
    "yellow": (38, 205, 240),
    "green": (86, 190, 160),
    "blue": (156, 195, 190),
    "purple": (196, 175, 165),
    "pink": (231, 110, 235),
    "white": (0, 6, 232),
    "black": (0, 6, 42),
}
_MAIN = 0.6  # least share of a sprite that its main colour makes up; the commonest colours are joined until they do
_SHADING = 0.7  # of the differences within the main colour


@dataclass(frozen=True)
class Thing:
    """Object of a scene: its draft, centre in pixels, fraction of its pixels that is visible, patches that show it.

    `salience` grows with visible area and towards the middle; `rank` 0 is the most salient of the scene.
    """

    draft: Draft
    x: float
    y: float
    visible: float
    salience: float
    rank: int
    patches: np.ndarray = field(repr=False, compare=False)

    @property
    def concept(self) -> str:
        """Canonical name of the concept."""
        return self.draft.concept


@dataclass(frozen=True)
class Sign:
    """Sign of a scene: its draft, centre in pixels, patches that show it."""

    draft: SignDraft
    x: float
    y: float
    patches: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class Scene:
    """Image (side, side, 3), its objects and signs; `owner` is the one at a pixel (signs first, then things; -1: none)."""

    image: np.ndarray = field(repr=False)
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    place: Place
    theme: str
    owner: np.ndarray = field(repr=False)

    def patches(self, targets: tuple["Thing | Sign", ...], grid: int) -> np.ndarray:
        """Target patches in a grid of any size: those that show one of the targets."""
        covered = coverage(self.owner, len(self.signs) + len(self.things), grid)
        places = {id(target): i for i, target in enumerate((*self.signs, *self.things))}
        return np.any(covered[[places[id(target)] for target in targets]], axis=0)


def background(layout: Layout, size: int) -> Image.Image:
    """Crop of the panorama."""
    yaw, pitch, view, mirrored = layout.camera
    photo = panorama(layout.place.row)
    turn = photo.width * 2 // 3
    side = view * turn
    left, top = (yaw % 1) * turn, photo.height * (0.5 + 0.5 * pitch) - side / 2
    image = photo.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def _main_color(hsv: np.ndarray, opaque: np.ndarray) -> np.ndarray:
    """Pixels of a sprite's main colour: of its commonest hues and greys, as many as make up `_MAIN` of it."""
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    grey = (saturation < 50) | (value < 45)
    kind = np.where(grey, 12 + (value >= 75) + (value >= 190), ((hue + 10) // 21) % 12).astype(int)
    kind[~opaque] = -1
    counts = np.bincount(kind[opaque], minlength=15)
    order = np.argsort(-counts, kind="stable")
    return np.isin(kind, order[: 1 + np.searchsorted(np.cumsum(counts[order]), _MAIN * counts.sum())])


@cache
def tinted(sheet: str, cell: int, color: str) -> Image.Image:
    """A sprite whose main colour is replaced: its shading and what has other colours (wheels, windows, eyes) stay."""
    image = sprite(sheet, cell).convert("RGBA")
    hsv = np.asarray(image.convert("RGB").convert("HSV")).astype(np.float32)
    main = _main_color(hsv, np.asarray(image.getchannel("A")) > 127)
    for channel, target in enumerate(_TINTS[color]):
        own = hsv[..., channel][main]
        shading = 0 if channel == 0 else _SHADING * (own - own.mean())
        hsv[..., channel][main] = np.clip(target + shading, 0, 255)
    rgb = Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")
    rgb.putalpha(image.getchannel("A"))
    return rgb.convert("RGBa")


def _object(draft: Draft, rng: np.random.Generator) -> Image.Image:
    image = tinted(draft.sheet, draft.cell, draft.tint) if draft.tint else sprite(draft.sheet, draft.cell)
    mirrored, turned, angle = rng.random() < 0.5, rng.random() < 0.5, 30 * rng.random() - 15
    if mirrored and draft.concept not in _UPRIGHT and "building" not in concepts()[draft.concept].hypernyms:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = draft.side / max(image.size)
    image = image.resize([max(4, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    if turned:
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return image.convert("RGBA")


def _sign(draft: SignDraft) -> Image.Image:
    paint, ink = words.SIGN_COLORS[draft.color]
    line = Image.fromarray(lettering(draft.text.upper(), draft.font))
    height = round(draft.height * 0.62)
    line = line.resize((max(3, round(line.width * height / line.height)), height), Image.Resampling.LANCZOS)
    margin = round(draft.height * 0.2)
    board = Image.new("RGBA", (line.width + 2 * margin + 2, line.height + 2 * margin), (*paint, 255))
    board.paste(Image.new("RGBA", line.size, (*ink, 255)), (margin + 1, margin), line)
    if draft.color in ("white", "black"):
        ImageDraw.Draw(board).rectangle((0, 0, board.width - 1, board.height - 1), outline=(128, 128, 128, 255))
    return board


def _shadow(canvas: Image.Image, image: Image.Image, x: int, y: int) -> None:
    alpha = Image.new("L", (image.width + 8, image.height + 8))
    alpha.paste(102, (4, 4), image)  # 40 % of the opacity
    canvas.paste((0, 0, 0), (x - 3, y - 2), alpha.filter(ImageFilter.BoxBlur(2)))


def coverage(owner: np.ndarray, count: int, grid: int) -> np.ndarray:
    """Patches of a grid that show each sign and thing: (count, grid * grid), in the order of `owner`."""
    cell = np.arange(len(owner)) * grid // len(owner)
    cells = cell[:, None] * grid + cell
    pixels = np.bincount(((owner + 1) * grid**2 + cells).ravel(), minlength=(count + 1) * grid**2)
    return pixels.reshape(count + 1, -1)[1:] >= max(1, _LEAST_SHARE * owner.size / grid**2)


class _Board:
    """Owner of each pixel while an image is composed."""

    def __init__(self, size: int):
        self.size = size
        self.owner = np.full((size, size), -1, np.int16)
        self.areas: list[int] = []
        self.left: list[int] = []  # pixels that are still visible
        self.firm: list[bool] = []

    def place(self, image: Image.Image, rng: np.random.Generator, firm: bool) -> tuple[int, int] | None:
        """Place an image where it covers little of earlier ones and nothing of firm ones: its corner, or None."""
        mask = np.asarray(image.getchannel("A")) >= 128
        room_x, room_y = self.size - image.width, self.size - image.height
        if room_x < 0 or room_y < 0 or not mask.any():
            return None
        for _ in range(_TRIES):
            x, y = int(rng.random() * (room_x + 1)), int(rng.random() * (room_y + 1))
            window = self.owner[y : y + image.height, x : x + image.width]
            covered = np.bincount(window[mask] + 1, minlength=len(self.areas) + 1)[1:]
            losses = [(i, count) for i, count in enumerate(covered.tolist()) if count]
            if any(self.firm[i] or self.left[i] - count < VISIBLE * self.areas[i] for i, count in losses):
                continue
            for i, count in losses:
                self.left[i] -= count
            window[mask] = len(self.areas)
            self.areas.append(int(mask.sum()))
            self.left.append(self.areas[-1])
            self.firm.append(firm)
            return x, y
        return None


def draw(layout: Layout, rng: np.random.Generator, size: int) -> Scene | None:
    """Draw a layout; None if its objects do not fit or one is too thin to show in any patch."""
    canvas, board = background(layout, size), _Board(size)
    signs = [(draft, _sign(draft)) for draft in layout.signs]
    spots = [spot for _, image in signs if (spot := board.place(image, rng, True)) is not None]
    if len(spots) < len(signs):
        return None
    drawn: list[tuple[Draft, tuple[int, int], Image.Image]] = []
    for (_, image), (x, y) in zip(signs, spots, strict=True):
        _shadow(canvas, image, x, y)
        canvas.paste(image, (x, y))
    for draft in layout.objects:
        image = _object(draft, rng)
        spot = board.place(image, rng, False)
        if spot is not None:
            _shadow(canvas, image, *spot)
            canvas.paste(image, spot, image)
            drawn.append((draft, spot, image))
    if len(drawn) < len(layout.objects) - 1:
        return None
    patches = coverage(board.owner, len(board.areas), size // PATCH)
    if not patches.any(1).all():
        return None
    visible = board.left
    first = len(signs)
    centers = [(x + image.width / 2, y + image.height / 2) for _, (x, y), image in drawn]
    salience = [
        visible[first + i] * (1.3 - np.hypot(x / size - 0.5, y / size - 0.5)) for i, (x, y) in enumerate(centers)
    ]
    ranks = np.argsort(np.argsort([-s for s in salience], kind="stable"), kind="stable").tolist()
    things = tuple(
        Thing(draft, *center, visible[first + i] / board.areas[first + i], salience[i], ranks[i], patches[first + i])
        for i, ((draft, _, _), center) in enumerate(zip(drawn, centers, strict=True))
    )
    placed = tuple(
        Sign(draft, x + image.width / 2, y + image.height / 2, patches[i])
        for i, ((draft, image), (x, y)) in enumerate(zip(signs, spots, strict=True))
    )
    return Scene(np.asarray(canvas), things, placed, layout.place, layout.theme, board.owner)
