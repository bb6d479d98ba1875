"""Image inputs of a checkpoint under other settings: padded or cropped to a square, cut into fewer crops."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivtp.backbones.family import ModelError

PADDINGS = ("pad", "crop")
WHOLE_IF_SEVERAL = ("llava_onevision",)
"""Families that do not cut the images of a prompt with several images into crops."""

Box = tuple[float, float, float, float]


def padding_of(image_processor: Any) -> str | None:
    """Way in which a processor makes an image square: "pad", "crop" (at the centre), or None for neither."""
    from transformers import CLIPImageProcessor, CLIPImageProcessorPil, LlavaImageProcessor, LlavaImageProcessorPil

    if isinstance(image_processor, (LlavaImageProcessor, LlavaImageProcessorPil)) and image_processor.do_pad:
        return "pad"
    kinds = (CLIPImageProcessor, CLIPImageProcessorPil, LlavaImageProcessor, LlavaImageProcessorPil)
    return "crop" if isinstance(image_processor, kinds) and image_processor.do_center_crop else None


def padded(image_processor: Any, padding: str) -> Any:
    """Processor that pads images to a square with its mean colour, or crops them at the centre, by `padding`.

    All other settings (mean, size, resampling, …) and the backend (torchvision or PIL) stay as they are. Raises ModelError
    if the processor does neither.
    """
    from transformers import LlavaImageProcessor, LlavaImageProcessorPil

    if padding not in PADDINGS:
        raise ModelError(f"image_padding={padding!r} is not one of {', '.join(PADDINGS)}")
    now = padding_of(image_processor)
    if now is None:
        raise ModelError(
            f"image_padding={padding!r} is for processors that crop images to a square (CLIPImageProcessor), but this "
            f"model has a {type(image_processor).__name__}; leave image_padding out (null)"
        )
    if now == padding:
        return image_processor
    kind = LlavaImageProcessorPil if image_processor.backend == "pil" else LlavaImageProcessor
    settings = image_processor.to_dict() | {"image_processor_type": kind.__name__, "do_pad": padding == "pad"}
    return kind.from_dict(settings)


def warn_if_cropped(where: str, model: Any, processor: Any) -> None:
    """Warn that a LLaVA checkpoint brings a processor that cuts off the sides of images, which it was not trained with."""
    if model.config.model_type == "llava" and padding_of(getattr(processor, "image_processor", None)) == "crop":
        warnings.warn(
            f"{where}: its processor crops images at the centre, while LLaVA-1.5 was trained on padded ones; give "
            "image_padding='pad' for the published numbers, or image_padding='crop' to keep it",
            stacklevel=3,
        )


def configure(
    model: Any, processor: Any, image_padding: str | None, max_crops: int | None, earlier: CropLimit | None = None
) -> CropLimit | None:
    """Apply settings of `load_model` to a model and its processor, in place; returns the limit of crops, if one is set.

    earlier  the limit of the last call for this model, which is lifted first
    """
    image_processor: Any = getattr(processor, "image_processor", None)
    # A limit is lifted unless the grids were set by hand since.
    lifted = earlier if earlier and model.config.image_grid_pinpoints == earlier.small else None
    crops = lifted.crops if lifted and max_crops is None else max_crops
    for name, value in (("image_padding", image_padding), ("max_crops", crops)):
        if value is not None and image_processor is None:
            raise ModelError(f"{name}={value!r} needs the model's processor; give it to ivtp.load_model")
    squares = image_processor if image_padding is None else padded(image_processor, image_padding)
    limit, grids = None, lifted.grids if lifted else None
    if max_crops is not None:
        limit = limit_crops(model.config, max_crops, grids)
    elif grids:
        model.config.image_grid_pinpoints = [list(grid) for grid in grids]
    if squares is not image_processor:
        processor.image_processor = squares
    if limit or lifted:
        squares.image_grid_pinpoints = [list(grid) for grid in model.config.image_grid_pinpoints]
    return limit


def limit_pixels(config: Any, image_processor: Any, pixels: int) -> None:
    """Let a processor that reads images at their own size make larger ones than `pixels` smaller, in place.

    Raises ModelError for a processor that does not, or a limit below one visual token.
    """
    size = dict(getattr(image_processor, "size", None) or {})
    if not hasattr(image_processor, "merge_size") or "longest_edge" not in size:
        raise ModelError(
            f"max_pixels={pixels} is for models that read images at their own size (Qwen2.5-VL, Qwen3-VL), which a "
            f"{config.model_type!r} model does not; leave max_pixels out (null)"
        )
    least = (image_processor.patch_size * image_processor.merge_size) ** 2
    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < least:
        raise ModelError(
            f"max_pixels={pixels!r} must be a whole number of at least {least}, the pixels of a visual token"
        )
    image_processor.size = {"shortest_edge": min(size["shortest_edge"], pixels), "longest_edge": pixels}


def visible_box(image_processor: Any, size: tuple[int, int]) -> Box:
    """Part of an image that a model with one crop per image reads: left, top, right, bottom in pixels of the image.

    size  width and height of the image. A padded image is read beyond its borders, a cropped one not up to them; a
          processor that only resizes reads all of it.
    """
    left, top, width, height = 0, 0, *size
    if padding_of(image_processor) == "pad":
        side = max(size)
        left, top, width, height = -((side - width) // 2), -((side - height) // 2), side, side
    if not getattr(image_processor, "do_center_crop", False):
        return left, top, left + width, top + height
    target = dict(image_processor.size)
    if short := target.get("shortest_edge"):
        resized = [int(short * edge / min(width, height)) for edge in (width, height)]
    else:
        resized = [target["width"], target["height"]]
    crop = [image_processor.crop_size[edge] for edge in ("width", "height")]
    scale = [before / after for before, after in zip((width, height), resized, strict=True)]
    x, y = ((whole - part) // 2 * s for whole, part, s in zip(resized, crop, scale, strict=True))
    return left + x, top + y, left + x + crop[0] * scale[0], top + y + crop[1] * scale[1]


def patch_boxes(image_processor: Any, size: tuple[int, int], patches: int) -> list[Box]:
    """Part of an image that each of the `patches` of a square grid shows, row by row.

    Boxes are left, top, right, bottom in pixels of the image, whose width and height are `size` (see `visible_box`).
    """
    left, top, right, bottom = visible_box(image_processor, size)
    side = round(patches**0.5)
    width, height = (right - left) / side, (bottom - top) / side
    corners = [(left + column * width, top + row * height) for row in range(side) for column in range(side)]
    return [(x, y, x + width, y + height) for x, y in corners]


@dataclass(frozen=True)
class CropLimit:
    """The most crops of an image besides the whole, where a checkpoint may cut images into more.

    grids    heights and widths, in pixels, among which the checkpoint chooses for an image
    several  images of prompts with several images are cut into crops too
    """

    crops: int
    side: int
    grids: tuple[tuple[int, int], ...]
    several: bool

    @classmethod
    def of(cls, config: Any, crops: int, grids: Sequence[Sequence[int]]) -> CropLimit:
        """The limit for a model's config and its checkpoint's grids."""
        pixels = tuple((int(height), int(width)) for height, width in grids)
        return cls(crops, config.vision_config.image_size, pixels, config.model_type not in WHOLE_IF_SEVERAL)

    @property
    def small(self) -> list[list[int]]:
        """The grids within the limit."""
        return [list(grid) for grid in self.grids if self.crops_of(grid) <= self.crops]

    def crops_of(self, grid: Sequence[int]) -> int:
        """Crops of an image on a grid of this height and width."""
        return (grid[0] // self.side) * (grid[1] // self.side)

    def affected(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Number of images of one prompt, by their widths and heights, that the checkpoint would cut into more crops."""
        from transformers.image_processing_utils import select_best_resolution

        if len(sizes) > 1 and not self.several:
            return 0
        grids = [list(grid) for grid in self.grids]
        chosen = (select_best_resolution((height, width), grids) for width, height in sizes)
        return sum(self.crops_of(grid) > self.crops for grid in chosen)


def limit_crops(config: Any, crops: int, grids: Sequence[Sequence[int]] | None = None) -> CropLimit:
    """Restrict the grids of a model's config to those of at most `crops` crops, in place.

    grids  those of the checkpoint, where the config is already restricted
    Raises ModelError for a family without such grids, or if none is that small.
    """
    if isinstance(crops, bool) or not isinstance(crops, int) or crops < 1:
        raise ModelError(f"max_crops={crops!r} must be a whole number of at least 1, or None")
    grids = grids or getattr(config, "image_grid_pinpoints", None)
    if not grids:
        raise ModelError(
            f"max_crops={crops} restricts the grids (image_grid_pinpoints) of LLaVA-NeXT and LLaVA-OneVision, which a "
            f"{config.model_type!r} model does not have; leave max_crops out (null)"
        )
    limit = CropLimit.of(config, crops, grids)
    if not limit.small:
        least = min(map(limit.crops_of, limit.grids))
        raise ModelError(f"max_crops={crops}: the smallest grid of this model has {least} crops; give at least {least}")
    config.image_grid_pinpoints = limit.small
    return limit


def advised_crops(config: Any) -> int | None:
    """The largest `max_crops` with which LLaVA-OneVision interpolates no image; None if it does so at its smallest grid."""
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    return most if CropLimit.of(config, most, config.image_grid_pinpoints).small else None
