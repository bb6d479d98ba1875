"""Labelled images for encoders: a folder per class, a data set of the hub, emoji."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ivtp.data.batches import Batch
from ivtp.data.errors import DataError
from ivtp.data.open_image import open_image, to_rgb

QUESTION = "which class ?"


class Images(Dataset):
    """Images with one label each, as samples like those of questions; `label` is the place of `answer` in `classes`.

    open      place → the image, RGB
    ids       names of the images, all different
    patches   place → "v" True on the patches that show the object, where that is known
    """

    def __init__(
        self,
        ids: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str],
        open: Callable[[int], Image.Image],
        patches: Callable[[int], torch.Tensor],
        stamp: Callable[[int], str],
    ) -> None:
        self.ids, self.labels, self.classes = ids, labels, list(classes)
        self.open, self.patches, self.stamp = open, patches, stamp
        if not len(ids):
            raise DataError("the data set holds no image")

    def __len__(self) -> int:
        return len(self.ids)

    def _text(self, place: int) -> dict:
        label = int(self.labels[place])
        about = {"id": self.ids[place], "image_id": self.ids[place], "question": QUESTION, "family": "all"}
        return about | {"answer": self.classes[label], "label": label, "patches": self.patches(place)}

    def __getitem__(self, place: int) -> dict:
        try:
            image = self.open(place)
        except MemoryError:
            raise
        except Exception as error:  # a decoder may raise anything on a damaged file
            raise DataError(f"image {self.ids[place]!r} cannot be read ({error}); mend or remove it") from error
        return self._text(place) | {"image": image}

    def sketch(self, place: int) -> tuple[dict, bytes]:
        """A sample without its image, and what stands for the image's content: opening all of a large set takes long."""
        return self._text(place), self.stamp(place).encode(errors="backslashreplace")


class ImageCollate:
    """Samples → Batch of pixels; there is no prompt. `processor` holds the model's `image_processor`."""

    image_token = "<image>"

    def __init__(self, processor) -> None:
        self.processor = processor

    def render(self, sample: dict) -> str:
        return sample["question"]

    def __call__(self, samples: list[dict]) -> Batch:
        images = [sample["image"] for sample in samples]
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return Batch({"pixel_values": pixels}, samples)


def image_folder(path: str | Path, patch_count: int) -> Images:
    """A folder with one folder of images per class, whose name is that of the class ("_" for a space). Names of WordNet
    (n01440764) are those of ImageNet: its order, and the words it has for them."""
    from torchvision.datasets import ImageFolder

    path = Path(path)
    try:
        found = ImageFolder(path)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.path={path} must be a folder with one folder of images for each class ({error})"
        ) from error
    files = [Path(file) for file, _ in found.samples]
    # Names of files are bytes: those that are no UTF-8 come as lone surrogates, which no tokenizer reads.
    names = [os.fsencode(name).decode(errors="replace").replace("_", " ") for name in found.classes]
    if all(re.fullmatch(r"n\d{8}", name) for name in found.classes):
        from timm.data import ImageNetInfo

        words = ImageNetInfo()
        try:
            names = [words.label_name_to_description(name).split(",")[0] for name in found.classes]
        except KeyError as error:
            raise DataError(
                f"data.path={path}: folder {error} has the form of a WordNet name, but ImageNet has no such class; rename it"
            ) from error
    else:
        first: dict[str, str] = {}
        for folder, name in zip(found.classes, names, strict=True):
            if (twin := first.setdefault(name, folder)) != folder:
                raise DataError(
                    f"data.path={path}: folders {twin!r} and {folder!r} are one class name, {name!r}; rename one"
                )
    ids = [file.relative_to(path).as_posix() for file in files]
    nowhere = torch.zeros(patch_count, dtype=torch.bool)

    def stamp(place: int) -> str:
        try:
            about = files[place].stat()  # in place of the content, which takes long to read of ImageNet
            return f"{ids[place]} {about.st_size} {about.st_mtime_ns}"
        except OSError:  # such as a link that leads nowhere
            return ids[place]

    labels = [label for _, label in found.samples]
    return Images(ids, labels, names, lambda i: open_image(files[i]), lambda _: nowhere, stamp)


def hub_images(
    path: str,
    patch_count: int,
    split: str = "test",
    image: str = "image",
    label: str = "label",
    revision: str | None = None,
) -> Images:
    """A data set of the hub, by id, or a folder of its parquet files; columns of images and of labels.

    Raises DataError for what is not there; the names of the classes are the label's own, else its different values.
    """
    try:
        from datasets import ClassLabel, load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise DataError("data=hub_images needs the package datasets: pip install datasets") from error
    try:
        found = load_dataset(path, split=split, revision=revision)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(
            f"data.path={path}, split {split!r}, cannot be loaded ({first}); offline, give a folder of parquet files, or run "
            "once with the data set in the HF cache"
        ) from error
    for key, column in (("image", image), ("label", label)):
        if column not in found.column_names:
            raise DataError(f"data.{key}={column} is no column of {path}; there are {', '.join(found.column_names)}")
    kind, values = found.features[label], found[label]
    if isinstance(kind, ClassLabel):
        names, labels = [name.replace("_", " ") for name in kind.names], list(values)
    else:
        different = sorted(set(values))
        names, labels = [str(value) for value in different], [different.index(value) for value in values]
    if any(value is None or value < 0 for value in labels):
        raise DataError(f"{path}, split {split!r}, has images without a label; choose another split")
    nowhere = torch.zeros(patch_count, dtype=torch.bool)
    ids = [str(i) for i in range(len(found))]
    return Images(
        ids, labels, names, lambda i: to_rgb(found[i][image]), lambda _: nowhere, lambda i: f"{found._fingerprint} {i}"
    )


def emoji(
    patch_count: int, styles: Sequence[str], size: int = 8, background: str = "white", whole: bool = True
) -> Images:
    """Emoji of the embedded assets in some drawing styles; the class is what is drawn.

    styles  at least one of `assets.EMOJI` and twemoji; every concept that noto draws is a class, whatever the styles
    size    longer side of the drawing in twelfths of the picture's, at most 12
    background  white, or photo: a crop of one of the panoramas
    whole   the model sees the whole picture, so that its patches are known if they stand in a square
    """
    from ivtp.data.scenes2.assets import EMOJI, concepts, panorama, places, sprite

    known = (*EMOJI, "twemoji")
    if isinstance(styles, str) or not styles or not set(styles) <= set(known):
        raise DataError(f"data.styles={styles} must be a list of styles: {', '.join(known)}")
    if not 1 <= size <= 12:
        raise DataError(f"data.size={size} must be between 1 and 12, the side of the whole picture")
    if background not in ("white", "photo"):
        raise DataError(f"data.background={background} must be white or photo")
    drawn = [concept for concept in concepts().values() if "noto" in concept.views]
    cells = [(i, s, cell) for i, concept in enumerate(drawn) for s in styles for cell in concept.views.get(s, ())]
    grid = isqrt(patch_count)
    known_patches = whole and grid**2 == patch_count

    def canvas(place: int) -> Image.Image:
        drawing = sprite(*cells[place][1:]).convert("RGBA")
        side = max(drawing.size) * 12 // size
        picture = Image.new("RGBA", (side, side))
        picture.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
        return picture

    def picture(place: int) -> Image.Image:
        drawing = canvas(place)
        behind = Image.new("RGBA", drawing.size, "white")
        if background == "photo":
            photo = panorama(place % len(places("test")))
            left, height = place * 37 % (photo.width - photo.height), photo.height
            behind = photo.crop((left, 0, left + height, height)).resize(drawing.size).convert("RGBA")
        return Image.alpha_composite(behind, drawing).convert("RGB")

    def shown(place: int) -> torch.Tensor:
        """Patches of which the drawing covers half or more."""
        if not known_patches:
            return torch.zeros(patch_count, dtype=torch.bool)
        cover = canvas(place).getchannel("A").resize((grid, grid), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(cover) >= 128).flatten()

    ids = [f"{drawn[i].name}-{style}-{cell}" for i, style, cell in cells]
    labels = [i for i, _, _ in cells]
    names = [concept.name for concept in drawn]
    return Images(ids, labels, names, picture, shown, lambda i: f"{ids[i]} {size} {background}")
