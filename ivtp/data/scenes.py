"""`scenes`: a procedural visual question answering data set.

A scene is a 96x96 picture of two to five objects on a blurred, darkened crop of a photograph (the two that ship with
scikit-learn), cluttered with grey strokes and blobs. An object is a shape or a number card, a real handwritten digit
(`sklearn.datasets.load_digits`), in one of six colours. Objects fill a block of 4x4 or 5x5 of the 12x12 patches.

Questions come in five families: `exist`, `attribute`, `digit`, `count` and `spatial`. Each has one answer, a single
word, and comes with the patches of the objects it asks about. Every scene has questions of every family.

Scenes depend on `(split, seed, index)` only, never on the order in which they are made. The splits share neither
scenes nor handwritten digits.

Example:
    >>> scene = make_scene("test", 0)
    >>> scene.image.shape
    (96, 96, 3)
    >>> sorted({question.family for question in make_questions(scene, 0)}) == sorted(FAMILIES)
    True
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import Dataset

SIZE = 96
PATCH = 8
GRID = SIZE // PATCH
SPLITS = ("train", "validation", "test")
FAMILIES = ("exist", "attribute", "digit", "count", "spatial")
COLORS = {
    "red": (225, 45, 40),
    "green": (50, 190, 60),
    "blue": (55, 95, 240),
    "yellow": (235, 215, 45),
    "purple": (195, 60, 215),
    "white": (238, 238, 238),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
KINDS = (*SHAPES, "number")
PLURALS = {kind: kind + ("es" if kind == "cross" else "s") for kind in KINDS}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_OTHER = "? a and any are color digit how in is left many of picture read right shape the there thing things what which"
VOCABULARY = tuple(
    sorted({"yes", "no", "above", "below", *_OTHER.split(), *COLORS, *KINDS, *PLURALS.values(), *NUMBERS})
)
"""Every word of the questions, the answers and the captions."""

_MARGIN = 2  # an object is this much smaller than its block, which leaves room for jitter
_DIGIT_SHARES = (0.7, 0.1, 0.2)  # of the handwritten digits, for train, validation, test
_SPATIAL_GAP = 2.0  # patches between the centres of two objects, so that "left of" is beyond doubt
_COUNT_WEIGHTS = {0: 0.5, 1: 0.6, 2: 1.0, 3: 1.9, 4: 3.0, 5: 4.0}  # rare counts are asked for more often


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Args:
        kind: one of `KINDS`.
        color: one of `COLORS`.
        digit: what the number says; -1 for a shape.
        source: index of the handwritten digit in `load_digits`; -1 for a shape.
        row, column: first patch of its block.
        size: side of its block in patches.
        patches: the patches that hold pixels of the object.
    """

    kind: str
    color: str
    digit: int
    source: int
    row: int
    column: int
    size: int
    patches: np.ndarray = field(repr=False, compare=False)

    @property
    def center(self) -> tuple[float, float]:
        """Row and column of its centre, in patches."""
        return self.row + self.size / 2, self.column + self.size / 2

    @property
    def name(self) -> str:
        """Colour and kind, as the questions call it."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A picture, the objects on it, and the same picture before they were drawn."""

    image: np.ndarray
    objects: tuple[Thing, ...]
    background: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Question:
    """A question about a scene and the patches of the objects asked about (none for "no" and "zero")."""

    text: str
    answer: str
    family: str
    patches: np.ndarray = field(repr=False, compare=False)


# Pictures ---------------------------------------------------------------------------------------------------------


@cache
def _photographs() -> tuple[Image.Image, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(2.5)) for photo in load_sample_images().images)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target


@cache
def digit_pool(split: str) -> np.ndarray:
    """Indices into `load_digits` that a split draws from; the splits' pools are disjoint."""
    order = np.random.default_rng(1706).permutation(len(_digits()[1]))
    cuts = np.round(np.cumsum(_DIGIT_SHARES)[:-1] * len(order)).astype(int)
    return np.split(order, cuts)[SPLITS.index(split)]


@cache
def _digits_by_value(split: str) -> list[np.ndarray]:
    pool, target = digit_pool(split), _digits()[1]
    return [pool[target[pool] == value] for value in range(10)]


@cache
def _shape_alpha(kind: str, side: int) -> np.ndarray:
    """Opacity of a shape, antialiased: (side, side) in [0, 1]."""
    scale = 4
    n = side * scale
    image = Image.new("L", (n, n))
    draw = ImageDraw.Draw(image)
    if kind in ("circle", "ring"):
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        if kind == "ring":
            inset = round(n * 0.23)
            draw.ellipse((inset, inset, n - 1 - inset, n - 1 - inset), fill=0)
    elif kind == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif kind == "triangle":
        draw.polygon(((n / 2 - 1, 0), (n - 1, n - 1), (0, n - 1)), fill=255)
    else:
        arm = 0.27 * n
        draw.polygon(((0, 0), (arm, 0), (n - 1, n - 1 - arm), (n - 1, n - 1), (n - 1 - arm, n - 1), (0, arm)), fill=255)
        draw.polygon(((n - 1, 0), (n - 1, arm), (arm, n - 1), (0, n - 1), (0, n - 1 - arm), (n - 1 - arm, 0)), fill=255)
    small = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _digit_alpha(source: int, side: int, rng: np.random.Generator, augment: bool) -> np.ndarray:
    """Opacity of a handwritten digit, enlarged smoothly; in training moved, scaled and turned a little."""
    angle, zoom, dx, dy = rng.uniform(-1, 1, 4) if augment else np.zeros(4)
    step = (8.6 / side) * (1 + 0.1 * zoom)
    cos, sin = step * np.cos(0.17 * angle), step * np.sin(0.17 * angle)
    mid = side / 2
    x0 = 4 + 0.5 * dx - cos * mid + sin * mid
    y0 = 4 + 0.5 * dy - sin * mid - cos * mid
    glyph = Image.fromarray(_digits()[0][source])
    large = glyph.transform(
        (side, side), Image.Transform.AFFINE, (cos, -sin, x0, sin, cos, y0), Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(large) * 1.25, 0, 1)


def _draw_background(rng: np.random.Generator) -> np.ndarray:
    photo = _photographs()[rng.integers(2)]
    x, y = rng.integers(0, photo.width - SIZE), rng.integers(0, photo.height - SIZE)
    image = photo.crop((x, y, x + SIZE, y + SIZE))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.point([int(value * gain) for gain in [rng.uniform(0.2, 0.5)] for value in range(256)] * 3)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 8)):
        grey = (int(rng.integers(40, 150)),) * 3
        x, y, dx, dy = (int(v) for v in (*rng.integers(0, SIZE, 2), *rng.integers(-24, 25, 2)))
        if rng.random() < 0.6:
            draw.line((x, y, x + dx, y + dy), fill=grey, width=int(rng.integers(1, 4)))
        else:
            side = 3 + abs(dx) // 3
            (draw.ellipse if dy > 0 else draw.rectangle)((x, y, x + side, y + side), fill=grey)
    noise = rng.integers(-6, 7, (SIZE, SIZE, 1), dtype=np.int16)
    return np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8)


def _draw_thing(canvas: np.ndarray, thing: Thing, rng: np.random.Generator, augment: bool) -> np.ndarray:
    """Draw onto the float canvas; return which patches hold pixels of the object."""
    side = thing.size * PATCH - _MARGIN
    y, x = np.array((thing.row, thing.column)) * PATCH + rng.integers(0, _MARGIN + 1, 2)
    color = np.array(COLORS[thing.color], np.float32) * rng.uniform(0.85, 1.05) + rng.uniform(-10, 10, 3)
    window = canvas[y : y + side, x : x + side]
    if thing.kind == "number":
        window *= 0.2  # the tinted card that the number is written on
        window += 0.18 * color
        alpha = _digit_alpha(thing.source, side, rng, augment)
        covered = np.ones((side, side), bool)
    else:
        alpha = _shape_alpha(thing.kind, side)
        covered = alpha > 0.5
    window += alpha[..., None] * (color - window)
    pixels = np.zeros((SIZE, SIZE), bool)
    pixels[y : y + side, x : x + side] = covered
    return pixels.reshape(GRID, PATCH, GRID, PATCH).any((1, 3)).reshape(-1)


# Scenes -----------------------------------------------------------------------------------------------------------


def _place(sizes: list[int], rng: np.random.Generator) -> list[tuple[int, int]] | None:
    """Blocks that do not overlap, at random; None where no room was left."""
    free = np.ones((GRID, GRID), bool)
    blocks = []
    for size in sizes:
        windows = np.lib.stride_tricks.sliding_window_view(free, (size, size))
        rows, columns = np.nonzero(windows.all((2, 3)))
        if not len(rows):
            return None
        pick = rng.integers(len(rows))
        row, column = int(rows[pick]), int(columns[pick])
        free[row : row + size, column : column + size] = False
        blocks.append((row, column))
    return blocks


def _draft(split: str, count: int, rng: np.random.Generator) -> list[Thing] | None:
    """Objects of a scene, the first of them a number; None where they do not fit."""
    colors = [list(COLORS)[i] for i in rng.integers(0, len(COLORS), count)]
    kinds = ["number", *(KINDS[i] for i in rng.choice(len(KINDS), count - 1, p=[0.17] * 5 + [0.15]))]
    repeat = rng.random()  # half of the scenes repeat a colour or a kind, or there would be little to count
    for i in range(2, count):
        if repeat < 0.25 and rng.random() < 0.75:
            kinds[i] = kinds[1]
        elif 0.25 <= repeat < 0.5 and rng.random() < 0.75:
            colors[i] = colors[1]
    sizes = [5 if kind == "triangle" or (count < 5 and rng.random() < 0.5) else 4 for kind in kinds]
    blocks = _place(sizes, rng)
    if blocks is None:
        return None
    by_value = _digits_by_value(split)
    things = []
    for kind, color, size, (row, column) in zip(kinds, colors, sizes, blocks, strict=True):
        digit = int(rng.integers(10)) if kind == "number" else -1
        source = int(rng.choice(by_value[digit])) if kind == "number" else -1
        things.append(Thing(kind, color, digit, source, row, column, size, np.zeros(GRID**2, bool)))
    return things


def make_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of a split. Every family has a question about it."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    count = int(rng.integers(2, 6))
    while True:
        things = _draft(split, count, rng)
        if things and _attribute(things) and _digit(things) and _spatial(things):
            break
    background = _draw_background(rng)
    canvas = background.astype(np.float32)
    for thing in things:
        thing.patches[:] = _draw_thing(canvas, thing, rng, split == "train")
    order = rng.permutation(len(things))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, tuple(things[i] for i in order), background)


def digit_value(source: int) -> int:
    """What handwritten digit `source` of `load_digits` says."""
    return int(_digits()[1][source])


def digit_card(source: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture with nothing on it but the card of one handwritten digit, `size` patches wide, and the card's patches.
    The same digit gives the same picture."""
    rng = np.random.default_rng((1706, source))
    color = list(COLORS)[rng.integers(len(COLORS))]
    row, column = (int(place) for place in rng.integers(0, GRID - size + 1, 2))
    canvas = _draw_background(rng).astype(np.float32)
    thing = Thing("number", color, digit_value(source), source, row, column, size, np.zeros(GRID**2, bool))
    patches = _draw_thing(canvas, thing, rng, augment=False)
    return np.clip(canvas, 0, 255).astype(np.uint8), patches


# Questions --------------------------------------------------------------------------------------------------------
# Each of these lists (text, answer, objects asked about) for a family, in groups: the group is drawn first.

_Candidate = tuple[str, str, tuple[Thing, ...]]


def _unique(things, key: Callable[[Thing], str]) -> list[Thing]:
    keys = [key(thing) for thing in things]
    return [thing for thing in things if keys.count(key(thing)) == 1]


def _attribute(things) -> list[list[_Candidate]]:
    alone = _unique(things, lambda t: t.color)
    shape, number = (
        [(f"what is the {t.color} thing ?", t.kind, (t,)) for t in alone if (t.kind == "number") == wanted]
        for wanted in (False, True)
    )
    color = [(f"what color is the {t.kind} ?", t.color, (t,)) for t in _unique(things, lambda t: t.kind)]
    return [group for group in (shape, shape, number, color, color, color) if group]


def _digit(things) -> list[list[_Candidate]]:
    numbers = [t for t in things if t.kind == "number"]
    named = [
        (text.format(t.color), NUMBERS[t.digit], (t,))
        for t in _unique(numbers, lambda t: t.color)
        for text in ("what digit is the {} number ?", "read the {} number ?")
    ]
    only = [("what digit is the number ?", NUMBERS[t.digit], (t,)) for t in numbers if len(numbers) == 1]
    return [group for group in (named, only) if group]


def _spatial(things) -> list[list[_Candidate]]:
    """What is on one side of an object, where exactly one object is."""
    by_kind: dict[str, list[_Candidate]] = {}
    colors: list[_Candidate] = []
    for thing in _unique(things, lambda t: t.name):
        for relation, (down, right) in RELATIONS.items():
            gaps = {
                i: down * (t.center[0] - thing.center[0]) + right * (t.center[1] - thing.center[1])
                for i, t in enumerate(things)
                if t is not thing
            }
            beside = [i for i, gap in gaps.items() if gap > 0]
            if len(beside) == 1 and gaps[beside[0]] >= _SPATIAL_GAP:
                other = things[beside[0]]
                text = f"what shape is {relation} the {thing.name} ?"
                by_kind.setdefault(other.kind, []).append((text, other.kind, (thing, other)))
                text = f"what color is the thing {relation} the {thing.name} ?"
                colors.append((text, other.color, (thing, other)))
    return [*by_kind.values(), colors] if colors else []


def _exist(things, rng: np.random.Generator) -> _Candidate:
    """Yes or no at equal odds, whatever is asked; half of the absent pairs are made of what is there."""
    shapes = {t.kind for t in things if t.kind != "number"}  # "number" is always there
    subject, yes = rng.integers(0 if shapes else 1, 3), rng.random() < 0.5
    if subject == 0:
        words = [k for k in SHAPES if (k in shapes) == yes]
        word = words[rng.integers(len(words))]
        asked = tuple(t for t in things if t.kind == word)
    elif subject == 1:
        present = {t.color for t in things}
        words = [c for c in COLORS if (c in present) == yes]
        word = words[rng.integers(len(words))]
        asked = tuple(t for t in things if t.color == word)
        word += " thing"
    else:
        present = {t.name for t in things}
        names = sorted(present)
        if not yes:
            names = [n for c in COLORS for k in KINDS if (n := f"{c} {k}") not in present]
            if rng.random() < 0.5:
                colors, kinds = {t.color for t in things}, {t.kind for t in things}
                names = [n for n in names if n.split()[0] in colors and n.split()[1] in kinds] or names
        word = names[rng.integers(len(names))]
        asked = tuple(t for t in things if t.name == word)
    text = ("is there a {} ?", "is there any {} ?")[rng.integers(2)]
    return text.format(word), "yes" if asked else "no", asked


def _count(things, rng: np.random.Generator) -> _Candidate:
    options: dict[int, list[tuple[str, tuple[Thing, ...]]]] = {}
    subjects = [(f"{color} things", [t for t in things if t.color == color]) for color in COLORS]
    subjects += [(PLURALS[kind], [t for t in things if t.kind == kind]) for kind in KINDS]
    for words, asked in [*subjects, ("things", things)]:
        options.setdefault(len(asked), []).append((words, tuple(asked)))
    weights = np.array([_COUNT_WEIGHTS[n] for n in options])
    group = list(options.values())[rng.choice(len(options), p=weights / weights.sum())]
    words, asked = group[rng.integers(len(group))]
    text = ("how many {} are there ?", "how many {} are in the picture ?")[rng.integers(2)]
    return text.format(words), NUMBERS[len(asked)], asked


def make_questions(scene: Scene, rng: np.random.Generator | int = 0, per_family: int = 1) -> list[Question]:
    """Draw `per_family` questions of every family, in the order of `FAMILIES`; the same one may come twice.

    Args:
        scene: what to ask about.
        rng: a generator, or a seed for one.
        per_family: how many of each family.
    """
    rng = np.random.default_rng(rng)
    grouped = {
        "attribute": _attribute(scene.objects),
        "digit": _digit(scene.objects),
        "spatial": _spatial(scene.objects),
    }
    questions = []
    for family in FAMILIES:
        for _ in range(per_family):
            if family == "exist":
                text, answer, asked = _exist(scene.objects, rng)
            elif family == "count":
                text, answer, asked = _count(scene.objects, rng)
            else:
                groups = grouped[family]
                group = groups[rng.integers(len(groups))]
                text, answer, asked = group[rng.integers(len(group))]
            patches = np.any([np.zeros(GRID**2, bool), *(t.patches for t in asked)], axis=0)
            questions.append(Question(text, answer, family, patches))
    return questions


class Scenes(Dataset):
    """One question of every family about every scene of a split.

    Items are dictionaries: `id` ("test-00012-exist"), `image_id`, `image` (PIL), `question`, `answer`, `family` and
    `patches` (BoolTensor over the model's patches, row by row). Scenes are made when first asked for, and kept.

    Args:
        split: "train", "validation" or "test".
        scenes: how many scenes; the data set is five times as long.
        seed: of the scenes and of the questions.
        patch_count: of an image in the model.
    """

    def __init__(self, split: str = "test", scenes: int = 400, seed: int = 0, patch_count: int = GRID**2):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.split, self.scenes, self.seed, self.patch_count = split, scenes, seed, patch_count
        self._made: dict[int, tuple[Scene, list[Question]]] = {}

    def __len__(self) -> int:
        return self.scenes * len(FAMILIES)

    def scene(self, index: int) -> tuple[Scene, list[Question]]:
        """A scene and its questions, one per family."""
        if index not in self._made:
            scene = make_scene(self.split, index, self.seed)
            rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index, 1))
            self._made[index] = scene, make_questions(scene, rng)
        return self._made[index]

    def __getitem__(self, item: int) -> dict:
        item = range(len(self))[item]
        index, which = divmod(item, len(FAMILIES))
        scene, questions = self.scene(index)
        question = questions[which]
        return {
            "id": f"{self.split}-{index:05d}-{question.family}",
            "image_id": f"{self.split}-{index:05d}",
            "image": Image.fromarray(scene.image),
            "question": question.text,
            "answer": question.answer,
            "family": question.family,
            "patches": torch.from_numpy(on_grid(question.patches, self.patch_count)),
        }


def on_grid(patches: np.ndarray, count: int) -> np.ndarray:
    """Patches of the 12×12 grid in a model's own square grid, if that divides each into equal parts (24×24: in four);
    none in other grids, where objects do not fill whole patches."""
    factor, rest = divmod(math.isqrt(count), GRID)
    if rest or (factor * GRID) ** 2 != count:
        return np.zeros(count, bool)
    return patches.reshape(GRID, GRID).repeat(factor, 0).repeat(factor, 1).reshape(-1)


def data_hash(split: str, scenes: int, seed: int = 0) -> str:
    """SHA-256 over the images, questions and answers of the first scenes of a split."""
    digest = hashlib.sha256()
    data = Scenes(split, scenes, seed)
    for index in range(scenes):
        scene, questions = data.scene(index)
        digest.update(scene.image.tobytes())
        for question in questions:
            digest.update(f"{question.family}|{question.text}|{question.answer}\n".encode())
    return digest.hexdigest()
