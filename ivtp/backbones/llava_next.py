"""LLaVA-NeXT: an image as a whole and in crops, rows of crops ended by newline tokens, padding taken out again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ivtp.backbones.image_inputs import advised_crops
from ivtp.backbones.llava import LlavaFront, pruned_by
from ivtp.backbones.llava import shape as llava_shape
from ivtp.backbones.pictures import Layout, Picture
from ivtp.pruning.cost import Shape

USUAL = (672, 672)
"""Height and width, in pixels, of the image whose cost is given where none is named: 2 × 2 crops and the whole."""


class Crops:
    """Images of any size: the whole first, then the crops of the grid that the model's config chooses for that size.

    Where a visual token stands in a prompt is asked of the model's own packing: it packs numbers instead of features.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.core, self.config = model, model.model, model.config
        self.separator = self.core.image_newline
        self.sizes: dict[tuple[int, int], Hashable] = {}
        self.layouts: dict[Hashable, Layout] = {}

    def pictures(self, input_ids: Tensor, inputs: dict) -> list[Picture]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        found, before = [], 0
        for number, size in enumerate(inputs["image_sizes"].tolist()):
            whole = self._in_crops(number, inputs)
            kind = self._kind(tuple(size), whole)
            crops = self.layouts[kind].crops
            if pixels.ndim == 5:  # padded to the most crops of the batch
                rows = pixels[number, :crops]
            else:
                rows, before = pixels[before : before + crops], before + crops
            found.append(Picture(kind, rows))
        return found

    def layout(self, kind: Hashable) -> Layout:
        return self.layouts[kind]

    def _in_crops(self, number: int, inputs: dict) -> bool:
        """Whether this image of the batch is cut into crops."""
        return True

    def _kind(self, size: tuple[int, int], in_crops: bool) -> Hashable:
        """Sizes that fill a prompt in the same way are of one kind."""
        key = size if in_crops else None
        if key not in self.sizes:
            layout = self._layout(size, in_crops)
            same = (k for k, known in self.layouts.items() if layout.joins is None and alike(known, layout))
            self.sizes[key] = next(same, size if in_crops else "one crop")
            self.layouts.setdefault(self.sizes[key], layout)
        return self.sizes[key]

    def _layout(self, size: tuple[int, int], in_crops: bool) -> Layout:
        of_crop = llava_shape(self.model)
        side = self.config.vision_config.image_size
        crops = image_size_to_num_patches(size, self.config.image_grid_pinpoints, side) if in_crops else 1
        numbers = torch.arange(1, crops * of_crop.patches + 1, dtype=torch.float64, device=self.model.device)
        # A newline counts as -1, and what is no whole number any more was blended out of several.
        packed = self._pack(numbers.view(crops, -1, 1), size, -torch.ones_like(numbers[:1]))[:, 0]
        slots = (packed.round().long() - 1).clamp_min(-1)
        left = int((slots >= 0).sum())
        shape = replace(of_crop, crops=crops, by_image=True, separators=len(slots) - left)
        if bool((packed == packed.round()).all()):
            return Layout(shape, slots)
        blended = replace(shape, crops=1, patches=left, columns=left)
        joins = partial(self._pack, size=size, newline=None)
        return Layout(blended, slots, joins=joins, rows=crops, advised=advised_crops(self.config))

    def _pack(self, features: Tensor, size: tuple[int, int], newline: Tensor | None) -> Tensor:
        """Features "c v d" of the crops as the model puts them into the prompt "s d"."""
        strategy = self.config.vision_feature_select_strategy
        return self.core.pack_image_features([features], torch.tensor([size]), strategy, image_newline=newline)[0][0]


def alike(one: Layout, other: Layout) -> bool:
    return one.joins is None and one.shape == other.shape and torch.equal(one.slots, other.slots)


def shape(model, image: tuple[int, int] | None = None) -> Shape:
    """Sizes of a model or of its config for an image of `image` (height, width) pixels."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    config = getattr(model, "config", model)
    one, (height, width) = llava_shape(model), image or USUAL
    side = config.vision_config.image_size
    rows, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, side)
    return replace(one, crops=rows * columns + 1, by_image=True, separators=rows * one.grid[0])


prune = pruned_by(lambda model: LlavaFront(model, Crops(model)))
