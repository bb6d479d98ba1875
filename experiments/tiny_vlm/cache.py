"""Scenes on disk as plain arrays, so that training does not wait for drawing."""

import multiprocessing
import os
from pathlib import Path

import numpy as np

from ivtp.data.scenes import COLORS, GRID, KINDS, SHAPES, Scene, Thing, make_scene

MOST = 5  # objects of a scene
_COLORS = list(COLORS)


def _fill(job: tuple[str, str, int, int, int, int]) -> None:
    folder, split, seed, scenes, start, stop = job
    arrays = _open(Path(folder), scenes, "r+")
    for index in range(start, stop):
        scene = make_scene(split, index, seed)
        arrays["images"][index] = scene.image
        arrays["things"][index] = -1
        for i, t in enumerate(scene.objects):
            arrays["things"][index, i] = (KINDS.index(t.kind), _COLORS.index(t.color), t.digit, t.row, t.column, t.size)
            arrays["patches"][index, i] = t.patches


def _open(folder: Path, scenes: int, mode: str) -> dict[str, np.ndarray]:
    shapes = {
        "images": (np.uint8, (scenes, 96, 96, 3)),
        "things": (np.int8, (scenes, MOST, 6)),
        "patches": (np.bool_, (scenes, MOST, GRID**2)),
    }
    mapped = {name: np.memmap(folder / name, dtype, mode, shape=shape) for name, (dtype, shape) in shapes.items()}
    return {name: np.asarray(array) for name, array in mapped.items()}  # a plain view is quicker to index


def load(root: Path, split: str, scenes: int, seed: int, workers: int = 2) -> dict[str, np.ndarray]:
    """Images (n, 96, 96, 3), things (n, 5, 6) and their patches (n, 5, 144) of a split; made where missing."""
    folder = root / f"{split}-{seed}-{scenes}"
    if not folder.exists():
        part = root / f"{folder.name}.part{os.getpid()}"
        part.mkdir(parents=True)
        _open(part, scenes, "w+")
        step = 500
        jobs = [(str(part), split, seed, scenes, i, min(i + step, scenes)) for i in range(0, scenes, step)]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for _ in pool.imap_unordered(_fill, jobs):
                pass
        part.rename(folder)
    return _open(folder, scenes, "r")


def restore(arrays: dict[str, np.ndarray], index: int) -> Scene:
    """The scene without its picture: enough to ask questions."""
    things = []
    for (kind, color, digit, row, column, size), patches in zip(
        arrays["things"][index], arrays["patches"][index], strict=True
    ):
        if kind >= 0:
            things.append(
                Thing(KINDS[kind], _COLORS[color], int(digit), -1, int(row), int(column), int(size), np.array(patches))
            )
    return Scene(np.zeros(0), tuple(things), np.zeros(0))


def patch_labels(things: np.ndarray, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every patch shows, for a batch of scenes.

    Args:
        things: (b, 5, 6) as in the cache.
        patches: (b, 5, 144).

    Returns:
        Type (b, 144): 0 background, then the shapes, then the digits; colour (b, 144): 0 background, then the colours;
        and (b, 144, 3): row and column of the centre of the object's block, and its size, in patches.
    """
    kind, color, digit = (things[..., i].astype(np.int64) for i in range(3))
    kind_label = np.where(kind == len(SHAPES), 1 + len(SHAPES) + digit, 1 + kind)
    row, column, size = (things[..., i].astype(np.float32) for i in range(3, 6))
    place = np.stack((row + size / 2, column + size / 2, size), -1)
    hit = patches & (kind >= 0)[..., None]
    which = hit.argmax(1)
    any_hit = hit.any(1)
    rows = np.arange(len(things))[:, None]
    return (
        np.where(any_hit, kind_label[rows, which], 0),
        np.where(any_hit, color[rows, which] + 1, 0),
        np.where(any_hit[..., None], place[rows, which], 0).astype(np.float32),
    )
