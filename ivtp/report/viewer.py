"""What the page's viewer needs of the data: pictures as the model saw them, and which patches are asked about.

It is stored beside the results at run time, so that the page can be written again without the data set or the model.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from ivtp import records
from ivtp.data.batches import pictures
from ivtp.data.failures import PREPARING, Failed, failure, read
from ivtp.pruning.cost import Shape


def drawable(shape: Shape) -> bool:
    """Whether what is kept can be shown on the image: one square grid of patches, the same for every image."""
    return shape.crops == 1 and not shape.by_image and math.isqrt(shape.patches) ** 2 == shape.patches


def watched(data: Dataset, images: int) -> list[int]:
    """Places of the samples that ask about the first `images` images of the data, one image each."""
    known: set[str] = set()
    places = []
    for place in range(len(data)):
        sample = read(data, place)
        if isinstance(sample, Failed) or len(pictures(sample)) != 1:
            continue
        image = sample.get("image_id", sample["id"])
        if image not in known and len(known) == images:
            break
        known.add(image)
        places.append(place)
    return places


def save(folder: Path, data: Dataset, processor, images: int) -> frozenset[str]:
    """Write `viewer/samples.jsonl` and one WebP per image; returns the ids of the samples in it."""
    rows = []
    written: set[str] = set()
    for place in watched(data, images):
        sample = data[place]
        image = sample.get("image_id", sample["id"])
        # Ids come from data: they may hold anything, so that files are called by their hash.
        name = hashlib.sha256(image.encode(errors="backslashreplace")).hexdigest()[:16] + ".webp"
        if name not in written:
            content = io.BytesIO()
            try:
                as_seen(processor.image_processor, *pictures(sample)).save(content, "WEBP", quality=88, method=4)
            except Exception as error:
                failure(sample, error, PREPARING)  # raises what is not the sample's own; the run records that
                continue
            written.add(name)
            records.replace(folder / "viewer" / name, content.getvalue())
        rows.append({"id": sample["id"], "picture": name, "asked": sample["patches"].nonzero()[:, 0].tolist()})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    records.replace(folder / "viewer" / "samples.jsonl", lines.encode())
    return frozenset(row["id"] for row in rows)


def as_seen(image_processor, image: Image.Image) -> Image.Image:
    """The image after the model's own resizing and cropping: patches lie where the model has them."""
    pixels = image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    if getattr(image_processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(image_processor, f"image_{name}"))[:, None, None] for name in ("mean", "std"))
        pixels = pixels * std + mean
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).numpy())
