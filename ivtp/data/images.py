"""Labelled images for encoders: folders per class, data sets of the hub, emoji."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ivtp.data.batches import Batch
from ivtp.data.failures import DataError
from ivtp.data.open_image import ImageError, decoding, open_image, to_rgb

QUESTION = "which class ?"


@dataclass(eq=False)
class Images(Dataset):
    """Images with one label each, as samples like those of questions; `label` is the index of `answer` in `classes`.

    ids      unique names of the images
    open     index → the image, RGB; raises ImageError for one that cannot be decoded
    patches  index → target patches "v": True on the patches that show the object, where that is known
    stamp    index → text that stands for the content of the image
    """

    ids: Sequence[str]
    labels: Sequence[int]
    classes: list[str]
    open: Callable[[int], Image.Image]
    patches: Callable[[int], torch.Tensor]
    stamp: Callable[[int], str]

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise DataError("the data set holds no image")

    def __len__(self) -> int:
        return len(self.ids)

    def _text(self, index: int) -> dict:
        name, label = self.ids[index], int(self.labels[index])
        fields = {"id": name, "image_id": name, "question": QUESTION, "family": "all"}
        return fields | {"answer": self.classes[label], "label": label, "patches": self.patches(index)}

    def __getitem__(self, index: int) -> dict:
        try:
            image = self.open(index)
        except ImageError as error:
            raise DataError(f"image {self.ids[index]!r} cannot be read ({error}); mend or remove it") from error
        return self._text(index) | {"image": image}

    def sketch(self, index: int) -> tuple[dict, bytes]:
        """Fields of a sample without its image, and its stamp as content: opening all images of a large set takes long."""
        return self._text(index), self.stamp(index).encode(errors="backslashreplace")


class ImageCollate:
    """Collate samples into a batch of pixels without a prompt; `processor` has the model's `image_processor`."""

    image_token = "<image>"

    def __init__(self, processor) -> None:
        self.processor = processor

    def render(self, sample: dict) -> str:
        """Text of a sample."""
        return sample["question"]

    def __call__(self, samples: list[dict]) -> Batch:
        """Collate samples."""
        images = [sample["image"] for sample in samples]
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return Batch({"pixel_values": pixels}, samples)


def image_folder(path: str | Path, patch_count: int) -> Images:
    """Images in one folder per class, which has the name of the class ("_" for a space).

    Names of WordNet (n01440764) stand for the classes of ImageNet, in its order and with its words.
    """
    from torchvision.datasets import ImageFolder

    path = Path(path)
    try:
        folders = ImageFolder(path)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.path={path} must be a folder with one folder of images for each class ({error})"
        ) from error
    files = [Path(file) for file, _ in folders.samples]
    # Names of files are bytes: other than UTF-8, they become lone surrogates, which no tokenizer reads.
    names = [os.fsencode(name).decode(errors="replace").replace("_", " ") for name in folders.classes]
    if all(re.fullmatch(r"n\d{8}", name) for name in folders.classes):
        from timm.data.imagenet_info import ImageNetInfo

        words = ImageNetInfo()
        try:
            names = [words.label_name_to_description(name).split(",")[0] for name in folders.classes]
        except KeyError as error:
            raise DataError(
                f"data.path={path}: folder {error} has the form of a WordNet name, but ImageNet has no such class; rename it"
            ) from error
    else:
        first: dict[str, str] = {}
        for folder, name in zip(folders.classes, names, strict=True):
            if (twin := first.setdefault(name, folder)) != folder:
                raise DataError(
                    f"data.path={path}: folders {twin!r} and {folder!r} are one class name, {name!r}; rename one"
                )
    ids = [file.relative_to(path).as_posix() for file in files]
    nowhere = torch.zeros(patch_count, dtype=torch.bool)

    def stamp(index: int) -> str:
        try:
            status = files[index].stat()  # in place of the content: reading all of ImageNet takes long
            return f"{ids[index]} {status.st_size} {status.st_mtime_ns}"
        except OSError:  # such as a broken link
            return ids[index]

    labels = [label for _, label in folders.samples]
    return Images(ids, labels, names, lambda i: open_image(files[i]), lambda _: nowhere, stamp)


def hub_images(
    path: str,
    patch_count: int,
    split: str = "test",
    image: str = "image",
    label: str = "label",
    revision: str | None = None,
) -> Images:
    """Images of a data set of the hub, by id, or of a folder with its parquet files.

    The names of the classes are those of the label column, else its unique values. Raises DataError for a missing data set,
    split or column.
    """
    try:
        from datasets import ClassLabel, load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise DataError("data=hub_images needs the package datasets: pip install datasets") from error
    try:
        rows = load_dataset(path, split=split, revision=revision)
    except (OSError, ValueError, DatasetNotFoundError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(
            f"data.path={path}, split {split!r}, cannot be loaded ({first}); offline, give a folder of parquet files, or run "
            "once with the data set in the HF cache"
        ) from error
    for key, column in (("image", image), ("label", label)):
        if column not in rows.column_names:
            raise DataError(f"data.{key}={column} is no column of {path}; there are {', '.join(rows.column_names)}")
    kind, values = rows.features[label], rows[label]
    if isinstance(kind, ClassLabel):
        names, labels = [name.replace("_", " ") for name in kind.names], list(values)
    else:
        different = sorted(set(values))
        names, labels = [str(value) for value in different], [different.index(value) for value in values]
    if any(value is None or value < 0 for value in labels):
        raise DataError(f"{path}, split {split!r}, has images without a label; choose another split")
    nowhere = torch.zeros(patch_count, dtype=torch.bool)

    def open_row(index: int) -> Image.Image:
        with decoding():
            return to_rgb(rows[index][image])

    ids = [str(i) for i in range(len(rows))]
    return Images(ids, labels, names, open_row, lambda _: nowhere, lambda i: f"{rows._fingerprint} {i}")


def emoji(
    patch_count: int, styles: Sequence[str], size: int = 8, background: str = "white", whole: bool = True
) -> Images:
    """Emoji of the embedded assets in some drawing styles, classified by the drawn concept.

    styles      at least one of `assets.EMOJI` and twemoji; every concept that noto draws is a class, whatever the styles
    size        longer side of the drawing in twelfths of the image's, at most 12
    background  white, or photo: a crop of one of the panoramas
    whole       the model reads the whole image, so that target patches are known if they form a square
    """
    from ivtp.data.scenes2.assets import EMOJI, concepts, panorama, places, sprite

    known = (*EMOJI, "twemoji")
    if isinstance(styles, str) or not styles or not set(styles) <= set(known):
        raise DataError(f"data.styles={styles} must be a list of styles: {', '.join(known)}")
    if not 1 <= size <= 12:
        raise DataError(f"data.size={size} must be between 1 and 12, the side of the whole image")
    if background not in ("white", "photo"):
        raise DataError(f"data.background={background} must be white or photo")
    drawn = [concept for concept in concepts().values() if "noto" in concept.views]
    cells = [(i, s, cell) for i, concept in enumerate(drawn) for s in styles for cell in concept.views.get(s, ())]
    grid = isqrt(patch_count)
    known_patches = whole and grid**2 == patch_count

    def canvas(index: int) -> Image.Image:
        drawing = sprite(*cells[index][1:]).convert("RGBA")
        side = max(drawing.size) * 12 // size
        image = Image.new("RGBA", (side, side))
        image.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
        return image

    def image(index: int) -> Image.Image:
        drawing = canvas(index)
        behind = Image.new("RGBA", drawing.size, "white")
        if background == "photo":
            photo = panorama(index % len(places("test")))
            left, height = index * 37 % (photo.width - photo.height), photo.height
            behind = photo.crop((left, 0, left + height, height)).resize(drawing.size).convert("RGBA")
        return Image.alpha_composite(behind, drawing).convert("RGB")

    def targets(index: int) -> torch.Tensor:
        """Patches that the drawing covers by half or more."""
        if not known_patches:
            return torch.zeros(patch_count, dtype=torch.bool)
        cover = canvas(index).getchannel("A").resize((grid, grid), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(cover) >= 128).flatten()

    ids = [f"{drawn[i].name}-{style}-{cell}" for i, style, cell in cells]
    labels = [i for i, _, _ in cells]
    names = [concept.name for concept in drawn]
    return Images(ids, labels, names, image, targets, lambda i: f"{ids[i]} {size} {background}")
