"""Patch tokens of an image, in the form that every vision tower gives them; and the run of a pruned encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ivtp.backbones.family import PruneOptions
from ivtp.backbones.hooks.replacing import Latest
from ivtp.core.loop import traverse
from ivtp.core.scores import mix
from ivtp.core.tokens import Facts, Tokens


class VisionRun:
    """Cuts of the last image batch through a vision tower, and the tokens that left it."""

    vision = Latest()
    tokens = Latest()

    def __init__(self, planner: Any, options: PruneOptions) -> None:
        self.plan, self.part = planner.outline, options.part

    @property
    def trace(self) -> VisionRun:
        """The run itself, which has the cuts in `vision` as the trace of a vision-language model has."""
        return self

    def through(self, stack: Any, image: Tensor, **kwargs: Any) -> Tokens:
        """Run images through the pruned tower; `kwargs` are for its `embed`."""
        tokens = stack.embed(image, self.plan.image, **kwargs)
        tokens, self.vision = traverse(stack, tokens, self.plan.vision, self.part)
        return tokens


def patch_tokens(x: Tensor, prefix: int, has_cls: bool, pixels: Tensor) -> Tokens:
    """Embedded images "b p+v d" as tokens: `prefix` tokens (class token first, registers), then the patches.

    The class token is the reference token; without one all patches are. Positions count from the first patch, so that a
    position is a place in the image.
    """
    place = torch.arange(x.shape[1], device=x.device)[None]
    return Tokens.of(
        x,
        visual=place >= prefix,
        reference=place == 0 if has_cls else place >= prefix,
        position=(place - prefix).expand(x.shape[0], -1),
        sample=sample_number(pixels),
        facts=Facts(x.shape[1] - prefix, lone=has_cls, lead=prefix if has_cls else 0, start=prefix),
    )


def sample_number(pixels: Tensor) -> Tensor:
    """A number "b" from the content of each image, independent of the batch that holds the image."""
    bits = pixels.flatten(1).float().view(torch.int32).long()
    return mix((bits * (2 * torch.arange(bits.shape[1], device=bits.device) + 1)).sum(1))


def shrink(image: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Resize an image to `grid` rows and columns of patches of `patch` pixels."""
    size = (grid[0] * patch[0], grid[1] * patch[1])
    return torch.nn.functional.interpolate(image.float(), size, mode="bicubic", antialias=True).to(image.dtype)


def spread(tokens: Tokens, grid: tuple[int, int] | None, full: tuple[int, int]) -> Tokens:
    """Place the tokens of a shrunk image in the full grid, each at the middle of the area that it covers; `grid` None: the
    image was not shrunk."""
    if grid is None:
        return tokens
    rows, columns = full
    row = (2 * torch.arange(grid[0], device=tokens.x.device) + 1) * rows // (2 * grid[0])
    column = (2 * torch.arange(grid[1], device=tokens.x.device) + 1) * columns // (2 * grid[1])
    place = (row[:, None] * columns + column).flatten().expand(len(tokens.x), -1)
    size = torch.full_like(place, rows * columns / place.shape[1], dtype=tokens.size.dtype)
    index = tokens.visual_index
    return replace(tokens, position=tokens.position.scatter(1, index, place), size=tokens.size.scatter(1, index, size))


def with_feature(tokens: Tokens, output: Tensor) -> Tokens:
    """Join the output of a layer, in width, to the features that leave the tower."""
    return replace(tokens, feature=output if tokens.feature is None else torch.cat([tokens.feature, output], -1))
