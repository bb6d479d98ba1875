"""Draw a layout: background, shadows, objects, signs, and which pixels each of them keeps."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ivtp.data.scenes2 import words
from ivtp.data.scenes2.assets import Place, concepts, lettering, panorama, sprite
from ivtp.data.scenes2.layout import SIDES, Draft, Layout, SignDraft

PATCH = 8
VISIBLE = 0.8
"""Share of an object's pixels that others leave uncovered, at least."""
_TRIES = 40
_LEAST_SHARE = 1 / 16  # of a patch that an object fills, for the patch to count as showing it
_UPRIGHT = frozenset({"stop sign", "calendar", "keyboard", "dice", "stopwatch", "pool ball", "slot machine", "ruler"})
# Hue (of 255), saturation and brightness that a tint takes: fixed part and the share of the sprite's own.
_TINTS = {
    "red": (0, 165, 0.35, 70, 0.7),
    "orange": (17, 175, 0.3, 105, 0.58),
    "yellow": (38, 165, 0.35, 125, 0.5),
    "green": (86, 150, 0.4, 55, 0.65),
    "blue": (156, 150, 0.4, 75, 0.68),
    "purple": (196, 130, 0.45, 75, 0.65),
    "pink": (231, 75, 0.25, 150, 0.41),
    "white": (0, 0, 0.04, 190, 0.25),
    "black": (0, 0, 0.04, 14, 0.25),
}


@dataclass(frozen=True)
class Thing:
    """An object of a scene: its draft, centre in pixels, share of its pixels that is visible, patches that show it.

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
        """Canonical name."""
        return self.draft.concept


@dataclass(frozen=True)
class Sign:
    """A sign of a scene."""

    draft: SignDraft
    x: float
    y: float
    patches: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class Scene:
    """A picture (side, side, 3), what is on it, and `owner`: what shows at a pixel (signs first, then things; -1: nothing)."""

    image: np.ndarray = field(repr=False)
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    place: Place
    theme: str
    owner: np.ndarray = field(repr=False)

    def patches(self, targets: tuple["Thing | Sign", ...], grid: int) -> np.ndarray:
        """Patches of a grid of any size that show one of the targets."""
        shown = coverage(self.owner, len(self.signs) + len(self.things), grid)
        places = {id(target): i for i, target in enumerate((*self.signs, *self.things))}
        return shown[[places[id(target)] for target in targets]].any(0)


def background(layout: Layout, size: int) -> Image.Image:
    """A crop of the panorama."""
    yaw, pitch, view, mirrored = layout.look
    photo = panorama(layout.place.row)
    turn = photo.width * 2 // 3
    side = view * turn
    left, top = (yaw % 1) * turn, photo.height * (0.5 + 0.5 * pitch) - side / 2
    image = photo.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def tinted(image: Image.Image, color: str) -> Image.Image:
    """A sprite in one colour, its shading kept."""
    hue, saturation, own_saturation, value, own_value = _TINTS[color]
    hsv = np.asarray(image.convert("RGB").convert("HSV")).astype(np.float32)
    out = np.empty_like(hsv)
    out[..., 0] = hue
    out[..., 1] = saturation + own_saturation * hsv[..., 1]
    out[..., 2] = value + own_value * hsv[..., 2]
    rgb = Image.fromarray(out.clip(0, 255).astype(np.uint8), "HSV").convert("RGB")
    rgb.putalpha(image.getchannel("A"))
    return rgb


def _object(draft: Draft, rng: np.random.Generator) -> Image.Image:
    image = sprite(draft.sheet, draft.cell)
    mirrored, turned, angle = rng.random() < 0.5, rng.random() < 0.5, 30 * rng.random() - 15
    if mirrored and draft.concept not in _UPRIGHT and "building" not in concepts()[draft.concept].hypernyms:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = draft.side / max(image.size)
    image = image.resize([max(4, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    if turned:
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    image = image.convert("RGBA")
    return tinted(image, draft.tint) if draft.tint else image


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
    """Owner of each pixel, while things are put on a picture."""

    def __init__(self, size: int):
        self.size = size
        self.owner = np.full((size, size), -1, np.int16)
        self.areas: list[int] = []
        self.left: list[int] = []  # pixels that are still visible
        self.firm: list[bool] = []

    def place(self, image: Image.Image, rng: np.random.Generator, firm: bool) -> tuple[int, int] | None:
        """A spot where the image covers at most a little of what is there, nothing of what is firm; None if there is none."""
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
    """Draw a layout; None where its objects do not fit."""
    canvas, board = background(layout, size), _Board(size)
    signs = [(draft, _sign(draft)) for draft in layout.signs]
    spots = [board.place(image, rng, True) for _, image in signs]
    if None in spots:
        return None
    shown: list[tuple[Draft, tuple[int, int], Image.Image]] = []
    for (_, image), (x, y) in zip(signs, spots, strict=True):
        _shadow(canvas, image, x, y)
        canvas.paste(image, (x, y))
    for draft in layout.objects:
        image = _object(draft, rng)
        spot = board.place(image, rng, False)
        if spot is not None:
            _shadow(canvas, image, *spot)
            canvas.paste(image, spot, image)
            shown.append((draft, spot, image))
    if len(shown) < len(layout.objects) - 1:
        return None
    patches = coverage(board.owner, len(board.areas), size // PATCH)
    visible = board.left
    first = len(signs)
    centers = [(x + image.width / 2, y + image.height / 2) for _, (x, y), image in shown]
    salience = [
        visible[first + i] / SIDES[size] ** 2 * (1.3 - np.hypot(x / size - 0.5, y / size - 0.5))
        for i, (x, y) in enumerate(centers)
    ]
    ranks = np.argsort(np.argsort([-s for s in salience], kind="stable"), kind="stable").tolist()
    things = tuple(
        Thing(draft, *center, visible[first + i] / board.areas[first + i], salience[i], ranks[i], patches[first + i])
        for i, ((draft, _, _), center) in enumerate(zip(shown, centers, strict=True))
    )
    placed = tuple(
        Sign(draft, x + image.width / 2, y + image.height / 2, patches[i])
        for i, ((draft, image), (x, y)) in enumerate(zip(signs, spots, strict=True))
    )
    return Scene(np.asarray(canvas), things, placed, layout.place, layout.theme, board.owner)
