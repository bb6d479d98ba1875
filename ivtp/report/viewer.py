"""Data of the page's viewer: images as the model reads them, and their target patches.

They are stored beside the results at run time, so that the page can be written again without the data set or the model.
"""

import hashlib
import io
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ivtp import results as store
from ivtp.core.flops import Shape
from ivtp.data.batches import images_of
from ivtp.data.failures import PREPARING, Failed, failure, read


def drawable(shape: Shape) -> bool:
    """True if kept tokens can be shown on the image: one square grid of patches, the same for every image."""
    return shape.crops == 1 and not shape.by_image and math.isqrt(shape.patches) ** 2 == shape.patches


def save(folder: Path, data: Any, processor, images: int) -> frozenset[str]:
    """Write `viewer/samples.jsonl` and one WebP for each of the first `images` images; return the ids of their samples.

    Samples with other than one image are left out.
    """
    rows: list[dict] = []
    known: set[str] = set()
    written: set[str] = set()
    for index in range(len(data)):
        sample = read(data, index)
        if isinstance(sample, Failed) or len(images_of(sample)) != 1:
            continue
        image = sample.get("image_id", sample["id"])
        if image not in known and len(known) == images:
            break
        known.add(image)
        # Ids come from data and may hold anything, so that files are named by their hash.
        name = hashlib.sha256(image.encode(errors="backslashreplace")).hexdigest()[:16] + ".webp"
        if name not in written:
            content = io.BytesIO()
            try:
                as_seen(processor.image_processor, *images_of(sample)).save(content, "WEBP", quality=88, method=4)
            except Exception as error:
                failure(sample, error, PREPARING)  # raises what is not the sample's own; the run records that
                continue
            written.add(name)
            store.replace(folder / "viewer" / name, content.getvalue())
        target = sample["patches"].nonzero()[:, 0].tolist()
        rows.append({"id": sample["id"], "picture": name, "target": target})
    store.replace(folder / "viewer" / "samples.jsonl", store.lines(store.with_schema(rows)))
    return frozenset(row["id"] for row in rows)


def as_seen(image_processor, image: Image.Image) -> Image.Image:
    """Image after the model's own resizing and cropping, in which patches lie where the model has them."""
    pixels = image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    if getattr(image_processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(image_processor, f"image_{name}"))[:, None, None] for name in ("mean", "std"))
        pixels = pixels * std + mean
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).numpy())
