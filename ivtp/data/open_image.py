"""Open image files as 8-bit RGB, by one rule for all data sets."""

import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageFile, ImageOps

from ivtp.data.failures import first_line
from ivtp.registry import UserError

MAX_ASPECT = 200
"""Largest ratio of the longer side to the shorter one. Qwen's processors refuse more; CLIP's, which scale the shorter side to
theirs, would need gigabytes for one image."""
DEEP = ("I", "F")
"""Pillow modes with more than 8 bits per pixel, by their first character ("I;16", "I;16B", …)."""


class ImageError(UserError):
    """Image that cannot be read; the message gives the reason without the image's name."""


def check_regular(path: str | os.PathLike) -> None:
    """Raise ImageError unless `path`, after symbolic links, is a regular file.

    Opening a FIFO would wait for ever, and opening a device may act on it.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error
    if not stat.S_ISREG(mode):
        tests = {"a folder": stat.S_ISDIR, "a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
        kind = next((name for name, test in tests.items() if test(mode)), "a device")
        raise ImageError(f"it is {kind}, not a file")


def open_image(path: str | os.PathLike) -> Image.Image:
    """Open an image file as RGB (see `to_rgb`); an animation or document gives its first frame.

    Raises ImageError for anything but a regular file, for a damaged one, and for more than 2 × `PIL.Image.MAX_IMAGE_PIXELS`
    pixels (179 million). PostScript is refused: Pillow would pass the file to Ghostscript, which executes it.
    """
    check_regular(path)
    # Pillow warns from half its limit on, and of damaged metadata; neither is a reason to refuse an image. lmms-eval,
    # once imported, makes Pillow fill the missing part of a truncated image with grey.
    whole = patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    with decoding(), warnings.catch_warnings(action="ignore"), whole, Image.open(path, formats=_formats()) as image:
        return to_rgb(image)


@contextmanager
def decoding() -> Iterator[None]:
    """Raise ImageError for any error of a decoder but MemoryError: on a damaged image it may raise anything."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(first_line(error)) from error


def image_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """Width and height of the image that `open_image` returns, read from the file's header; None without one."""
    try:
        check_regular(path)
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_formats()) as image:
            # Pillow itself turns TIFF.
            turned = image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except Exception:  # as above; reading the sample reports the error
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB, as a viewer shows it.

    EXIF orientation is applied (in place). Transparent parts are composited on white: the colours below them are undefined,
    and often black or noise. Deeper pixels are scaled (see `eight_bit`), other colour spaces converted.
    Raises ImageError for a side more than `MAX_ASPECT` times the other.
    """
    longer, shorter = max(image.size), min(image.size)
    if longer > MAX_ASPECT * shorter:
        raise ImageError(
            f"it is {image.width} × {image.height} pixels, and no side may be more than {MAX_ASPECT} times the other"
        )
    image.load()  # so that errors below are the metadata's
    # Images with damaged metadata are shown as they are stored, as viewers do.
    with suppress(SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(DEEP):
        image = eight_bit(image)
    elif image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bit(image: Image.Image) -> Image.Image:
    """Convert a greyscale image of 16 or 32 bits or of floats to 8 bits (mode "L"); Pillow's own conversion clips to 0–255.

    16-bit values are divided by 257. For 32-bit integers and floats, white is the first of 1 (floats only), 255 and 65535
    that no value exceeds; values beyond, or negative ones, are scaled from minimum to maximum. NaN becomes black.
    """
    values = np.asarray(image, dtype=np.float32)
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;16"):
        known = values[np.isfinite(values)]
        if not known.size:
            raise ImageError("it has no finite pixel value")
        least, most = float(known.min()), float(known.max())
        whites = [1.0] * (image.mode == "F") + [255.0, 65535.0]
        high = next((white for white in whites if most <= white), None) if least >= 0 else None
        if high is None:
            low, high = least, most
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / ((high - low) or 1))
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name != "EPS"]
