"""Scenes with their questions, by split, seed and index; and as a data set."""

import hashlib
from collections import OrderedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ivtp.data.scenes2.assets import SPLITS
from ivtp.data.scenes2.drawing import PATCH, Scene, draw
from ivtp.data.scenes2.layout import OBJECTS, compose
from ivtp.data.scenes2.questions import FAMILIES, Question, make_questions

_KEPT = 512  # scenes in memory


def make_scene(
    split: str, index: int, seed: int = 0, size: int = 144, mix: dict[str, int] | None = None
) -> tuple[Scene, list[Question]]:
    """Scene `index` of a split, and questions about it.

    Args:
        split: one of `SPLITS`.
        index: of the scene.
        seed: of scenes and questions.
        size: side of the picture in pixels, 144 or 192.
        mix: how many questions of each family; one by default.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if size not in OBJECTS:
        raise ValueError(f"size must be one of {', '.join(map(str, OBJECTS))}, got {size!r}")
    rng = np.random.default_rng((seed, SPLITS.index(split), index, size))
    while True:
        scene = draw(compose(rng, split, size), rng, size)
        if scene is None:
            continue
        try:
            return scene, make_questions(scene, split, rng, mix)
        except ValueError:  # rare: no tinted object can be named, say
            continue


class Scenes2(Dataset):
    """One question of every family about every scene of a split.

    Items are dictionaries: `id` ("test-00012-exist"), `image_id`, `image` (PIL), `question`, `answer`, `family`,
    `patches` (BoolTensor over the patches, row by row), and `difficulty`, what makes it hard, as far as it applies: `size`
    and `salience` of its targets, `negatives` of exist questions, `place`: whether the photograph is new to the split.

    Args:
        split: one of `SPLITS`.
        scenes: how many scenes; the data set is eight times as long.
        seed: of the scenes and of the questions.
        size: side of the pictures in pixels, 144 or 192.
        grid: patches on a side of the model that reads them; by default those of 8 pixels.
    """

    def __init__(self, split: str = "test", scenes: int = 400, seed: int = 0, size: int = 144, grid: int | None = None):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if size not in OBJECTS:
            raise ValueError(f"size must be one of {', '.join(map(str, OBJECTS))}, got {size!r}")
        if scenes < 1:
            raise ValueError(f"scenes must be at least 1, got {scenes!r}")
        self.split, self.scenes, self.seed, self.size, self.grid = split, scenes, seed, size, grid or size // PATCH
        self._made: OrderedDict[int, tuple[Scene, list[Question]]] = OrderedDict()

    def __len__(self) -> int:
        return self.scenes * len(FAMILIES)

    def scene(self, index: int) -> tuple[Scene, list[Question]]:
        """A scene and its questions, one per family."""
        if index not in self._made:
            if len(self._made) >= _KEPT:
                self._made.popitem(last=False)
            self._made[index] = make_scene(self.split, index, self.seed, self.size)
        return self._made[index]

    def __getitem__(self, item: int) -> dict:
        item = range(len(self))[item]
        index, which = divmod(item, len(FAMILIES))
        scene, questions = self.scene(index)
        question = questions[which]
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
