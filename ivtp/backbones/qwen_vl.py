"""Qwen2.5-VL and Qwen3-VL: images at their own size, 2 × 2 patches a token, M-RoPE; Qwen3's DeepStack."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from ivtp.backbones import ModelError
from ivtp.backbones.decoders import decoder_layers
from ivtp.backbones.llava import counted, mean_of_real, pruned_by
from ivtp.backbones.pictures import Layout, Picture
from ivtp.backbones.qwen_vit import QwenVit, merged
from ivtp.backbones.transformers_attention import CACHE
from ivtp.pruning.cost import Layers, Shape
from ivtp.pruning.tokens import Tokens

USUAL = (896, 896)
"""Height and width, in pixels, of the image whose cost is given where none is named."""


class QwenFront:
    """The tower, its merger as the projector, and three-axis positions.

    There is no class token: the mean of what is left of the units stands for the whole.
    """

    separator = None
    renumbers = False
    counts_padding = False

    def __init__(self, model: nn.Module) -> None:
        self.model, self.core = model, model.model
        self.tower = self.core.visual
        self.made: dict[Hashable, tuple[Layout, QwenVit]] = {}

    def pictures(self, input_ids: Tensor, inputs: dict) -> list[Picture]:
        pixels, grids = inputs.get("pixel_values"), inputs.get("image_grid_thw")
        if pixels is None:
            return []
        rows = pixels.split(grids.prod(1).tolist())
        return [Picture(tuple(grid), patches[None]) for grid, patches in zip(grids.tolist(), rows, strict=True)]

    def _of(self, kind: tuple[int, int, int]) -> tuple[Layout, QwenVit]:
        if kind not in self.made:
            made = of_grid(self.model.config, kind)
            slots = torch.arange(made.patches, device=self.model.device)
            self.made[kind] = Layout(made, slots), QwenVit(self.tower, kind)
        return self.made[kind]

    def layout(self, kind: tuple[int, int, int]) -> Layout:
        return self._of(kind)[0]

    def stack(self, kind: tuple[int, int, int]) -> QwenVit:
        return self._of(kind)[1]

    def read(self, tokens: Tokens) -> Tensor:
        return tokens.x

    def project(self, features: Tensor) -> Tensor:
        return merged(self.tower.merger, features, self.tower.spatial_merge_unit)

    def cls(self, stack: QwenVit, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        return mean_of_real(tokens.of_visual(tokens.x), tokens), None

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, given: Tensor | None, inputs: dict) -> Tensor:
        if given is None and inputs.get("image_grid_thw") is not None:
            # As the model's own forward counts: rows and columns of images are axes of their own.
            given = self.core.compute_3d_position_ids(
                input_ids=input_ids,
                image_grid_thw=inputs["image_grid_thw"],
                video_grid_thw=None,
                inputs_embeds=None,
                attention_mask=attention_mask,
                mm_token_type_ids=inputs.get("mm_token_type_ids"),
                **{CACHE: None},
            )
        if given is None:
            given = counted(input_ids)
        if given.ndim == 3 and given.shape[0] == 4:
            given = given[1:]  # the first is the text's own count, for packed sequences
        return given.expand(3, *input_ids.shape)


def of_grid(config, grid: tuple[int, int, int]) -> Shape:
    """Sizes for an image of (frames, rows, columns) patches."""
    vision, language = config.vision_config, decoder_layers(config)
    heads, width = vision.num_heads, vision.hidden_size
    unit = vision.spatial_merge_size**2
    frames, rows, columns = grid
    window = getattr(vision, "window_size", None)
    windows, whole = frames, ()
    if window:
        side = window // vision.patch_size
        windows, whole = frames * -(-rows // side) * -(-columns // side), tuple(vision.fullatt_block_indexes)
    matrices = 3 if vision.model_type == "qwen2_5_vl_vision" or window else 2
    layers = Layers(
        vision.depth, width, vision.intermediate_size, heads, heads, width // heads, matrices, windows, whole
    )
    return Shape(
        layers,
        frames * rows * columns // unit,
        vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        prefix=0,
        has_cls=False,
        projector_in=width * unit,
        projector_hidden=width * unit,
        language=language,
        vocabulary=config.text_config.vocab_size,
        columns=columns // vision.spatial_merge_size,
        unit=unit,
        taps=tuple(getattr(vision, "deepstack_visual_indexes", ())),
        by_image=True,
        resizable=False,
    )


def shape(model, image: tuple[int, int] | None = None) -> Shape:
    """Sizes of a model or of its config for an image of `image` (height, width) pixels."""
    config = getattr(model, "config", model)
    vision = config.vision_config
    step = vision.patch_size * vision.spatial_merge_size
    height, width = image or USUAL
    if height % step or width % step:
        raise ModelError(f"image={height} × {width} pixels: both must be multiples of {step}, one visual token's side")
    return of_grid(config, (1, height // vision.patch_size, width // vision.patch_size))


prune = pruned_by(QwenFront)
