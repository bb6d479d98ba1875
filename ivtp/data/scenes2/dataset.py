"""Scenes with their questions, by split, seed and index, and as a data set."""

import hashlib
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ivtp.data.scenes2.assets import SPLITS
from ivtp.data.scenes2.drawing import PATCH, Scene, draw
from ivtp.data.scenes2.layout import OBJECTS, compose
from ivtp.data.scenes2.questions import FAMILIES, Question, make_questions


def check(split: str, size: int) -> None:
    """Raise ValueError for an unknown split or size."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if size not in OBJECTS:
        raise ValueError(f"size must be one of {', '.join(map(str, OBJECTS))}, got {size!r}")


def make_scene(
    split: str, index: int, seed: int = 0, size: int = 144, mix: dict[str, int] | None = None
) -> tuple[Scene, list[Question]]:
    """Make scene `index` of a split, of `size` × `size` pixels, and questions about it: `mix` of each family, by default one."""
    check(split, size)
    rng = np.random.default_rng((seed, SPLITS.index(split), index, size))
    while True:
        scene = draw(compose(rng, split, size), rng, size)
        if scene is None:
            continue
        try:
            return scene, make_questions(scene, split, rng, mix)
        except ValueError:  # rare: no tinted object can be named, say
            continue


_scene = lru_cache(512)(make_scene)
MOST = 1_000_000
"""Scenes of a data set at most: months of evaluation."""


class Scenes2(Dataset):
    """One question of every family about every scene of a split.

    Items are dictionaries: `id` ("test-00012-exist"), `image_id`, `image` (PIL), `question`, `answer`, `family`,
    `patches` (BoolTensor of the target patches, row by row), and `difficulty` with those of its levels that apply: `size`
    and `salience` of the targets, `negatives` of exist questions, `place` (photograph new to the split or seen in training).

    scenes  number of scenes; the data set is eight times as long
    size    side of the images in pixels, 144 or 192
    grid    patches per side of the model's grid; by default patches of 8 pixels
    """

    def __init__(self, split: str = "test", scenes: int = 400, seed: int = 0, size: int = 144, grid: int | None = None):
        check(split, size)
        if not 1 <= scenes <= MOST:
            raise ValueError(f"scenes must be between 1 and {MOST}, got {scenes!r}")
        self.split, self.scenes, self.seed, self.size, self.grid = split, scenes, seed, size, grid or size // PATCH

    def __len__(self) -> int:
        return self.scenes * len(FAMILIES)

    def scene(self, index: int) -> tuple[Scene, list[Question]]:
        """A scene and its questions, one per family."""
        return _scene(self.split, index, self.seed, self.size)

    def __getitem__(self, item: int) -> dict:
        item = range(len(self))[item]
        index, number = divmod(item, len(FAMILIES))
        scene, questions = self.scene(index)
        question = questions[number]
        difficulty = {
            "size": question.size,
            "salience": question.salience,
            "negatives": question.negatives,
            "place": "new" if scene.place.split != "train" else "seen",
        }
        return {
            "id": f"{self.split}-{index:05d}-{question.family}",
            "image_id": f"{self.split}-{index:05d}",
            "image": Image.fromarray(scene.image),
            "question": question.text,
            "answer": question.answer,
            "family": question.family,
            "patches": torch.from_numpy(scene.patches(question.targets, self.grid)),
            "difficulty": {name: level for name, level in difficulty.items() if level},
        }


def data_hash(split: str, scenes: int, seed: int = 0, size: int = 144) -> str:
    """SHA-256 over the images, questions and answers of the first scenes of a split."""
    digest = hashlib.sha256()
    for index in range(scenes):
        scene, questions = make_scene(split, index, seed, size)
        digest.update(scene.image.tobytes())
        for question in questions:
            digest.update(f"{question.family}|{question.text}|{question.answer}\n".encode())
    return digest.hexdigest()
