"""Scenes on disk in shards of plain arrays, so that training does not wait for drawing; filled in the background."""

import argparse
import json
import os
import time
from functools import cache
from pathlib import Path

import numpy as np

from ivtp.data.scenes2 import Scene, make_scene
from ivtp.data.scenes2.assets import concepts, places
from ivtp.data.scenes2.words import COLORS, NUMBERS, PRICES, SIGN_COLORS, SIGN_WORDS

SHARD = 1000  # scenes, by default
MOST, SIGNS = 14, 3
MIX = {"exist": 3, "attribute": 2, "name": 3, "spatial": 4, "count": 3, "text": 2, "place": 1, "logic": 2}
"""Questions per training scene; other splits have one of each family, as the data set."""
NAMES = tuple(concepts())
TEXTS = (*SIGN_WORDS, *NUMBERS, *PRICES)
TIERS = ("small", "medium", "large")
_COLUMNS = ("concept", "tint", "rank", "tier")


def describe(scene: Scene) -> dict[str, np.ndarray]:
    """A scene as numbers: things (14, 4), signs (3, 2), place, and packed patches of both (17, ...)."""
    things, signs = np.full((MOST, len(_COLUMNS)), -1, np.int16), np.full((SIGNS, 2), -1, np.int16)
    shown = np.zeros((MOST + SIGNS, (scene.image.shape[0] // 8) ** 2), bool)
    for i, thing in enumerate(scene.things):
        tint = COLORS.index(thing.draft.tint) if thing.draft.tint else -1
        things[i] = NAMES.index(thing.concept), tint, thing.rank, TIERS.index(thing.draft.tier)
        shown[i] = thing.patches
    for i, sign in enumerate(scene.signs):
        signs[i] = list(SIGN_COLORS).index(sign.draft.color), TEXTS.index(sign.draft.text)
        shown[MOST + i] = sign.patches
    return {
        "images": scene.image,
        "things": things,
        "signs": signs,
        "places": np.int16(scene.place.row),
        "shown": np.packbits(shown, axis=1),
    }


def make_shard(folder: Path, split: str, number: int, seed: int, size: int, scenes: int = SHARD) -> None:
    """Write one shard: arrays and the questions of its scenes."""
    part = folder / f"{number:04d}.part{os.getpid()}"
    part.mkdir(parents=True, exist_ok=True)
    rows, asked = [], []
    for index in range(number * scenes, (number + 1) * scenes):
        scene, questions = make_scene(split, index, seed, size, MIX if split == "train" else None)
        rows.append(describe(scene))
        where = {id(t): i for i, t in enumerate(scene.things)} | {id(s): MOST + i for i, s in enumerate(scene.signs)}
        asked.append(
            [
                (
                    q.family,
                    q.text,
                    q.answer,
                    q.terms,
                    [where[id(t)] for t in q.targets],
                    q.size,
                    q.salience,
                    q.negatives,
                )
                for q in questions
            ]
        )
    for name in rows[0]:
        np.save(part / f"{name}.npy", np.stack([row[name] for row in rows]))
    (part / "questions.json").write_text(json.dumps(asked, separators=(",", ":")))
    part.rename(folder / f"{number:04d}")


def root(folder: Path, split: str, seed: int, size: int) -> Path:
    """Where the shards of a split lie."""
    return folder / "data" / f"{split}-{seed}-{size}"


def ready(folder: Path, split: str, seed: int, size: int) -> list[Path]:
    """Finished shards, in order."""
    return sorted(p for p in root(folder, split, seed, size).glob("[0-9]*") if "." not in p.name)


def wait(folder: Path, split: str, seed: int, size: int, least: int = 1) -> list[Path]:
    """Finished shards, once there are so many."""
    while len(found := ready(folder, split, seed, size)) < least:
        time.sleep(5)
    return found


class Shard:
    """One shard's arrays (memory-mapped) and questions (read when first asked for)."""

    def __init__(self, path: Path):
        self.path = path
        for name in ("images", "things", "signs", "places", "shown"):
            setattr(self, name, np.load(path / f"{name}.npy", mmap_mode="r"))
        self._questions: list | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def questions(self) -> list:
        """Per scene: family, text, answer, terms, targets, size, salience, negatives of every question."""
        if self._questions is None:
            self._questions = json.loads((self.path / "questions.json").read_text())
        return self._questions

    def patches(self, index: np.ndarray) -> np.ndarray:
        """Patches of the things and signs of some scenes: (n, 17, patches)."""
        count = (self.images.shape[1] // 8) ** 2
        return np.unpackbits(self.shown[index], axis=-1, count=count).astype(bool)


@cache
def place_names() -> tuple[str, ...]:
    """Answer to "where is this" by row of the panoramas."""
    return tuple(place.place for place in places("test"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/scenes2"))
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=144)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--scenes", type=int, default=SHARD, help="of a shard")
    parser.add_argument("--first", type=int, default=0, help="shard to begin with")
    parser.add_argument("--every", type=int, default=1, help="draw each so many-th shard, beside other processes")
    options = parser.parse_args()
    target = root(options.folder, options.split, options.seed, options.side)
    for number in range(options.first, options.shards, options.every):
        if not (target / f"{number:04d}").exists():
            make_shard(target, options.split, number, options.seed, options.side, options.scenes)
            print(f"{target.name}: shard {number}", flush=True)


if __name__ == "__main__":
    main()
