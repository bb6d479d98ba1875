"""Qwen2.5-VL and Qwen3-VL: images at their own size, 2 × 2 patches a token, M-RoPE; Qwen3's DeepStack."""

from __future__ import annotations

from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from ivtp.backbones.family import Family, ModelError, register_family
from ivtp.backbones.hooks.attention_interface import QKV, attend, cache_argument, check_kernel, peek
from ivtp.backbones.hooks.padding import log_size, mean_of_real
from ivtp.backbones.language.llama import decoder_layers
from ivtp.backbones.vision.patches import patch_tokens, with_feature
from ivtp.backbones.vision.units import WindowAttention
from ivtp.backbones.vlm.adapter import ImageInput, Layout, VLMAdapter, default_positions
from ivtp.core.attention import Attention
from ivtp.core.flops import Layers, Shape
from ivtp.core.tokens import Tokens

Grid = tuple[int, int, int]
"""Frames, rows and columns of patches."""

MOST = 1 << 19
"""Patches in all layouts that are kept: their rotary embeddings take 640 bytes each."""
USUAL = (896, 896)
"""Height and width, in pixels, of the image whose cost is given where none is named."""


class Pieces(NamedTuple):
    """Units that attend to each other: the number of each packed unit's piece "u", and the pieces' bounds in patches."""

    number: Tensor
    bounds: Tensor


class Packing(NamedTuple):
    """Real units in the order of the model's own forward, those of the whole batch in a row.

    order   flat place of each packed unit "u"; rope: rotary embedding of its patches "p e"
    inside  the packed place of every unit "b v", -1: padding
    whole, windows  its pieces in layers that attend to whole frames, and in those that attend in windows
    """

    order: Tensor
    rope: Any
    inside: Tensor
    whole: Pieces
    windows: Pieces


class QwenVit:
    """One size of images, `grid` = (frames, rows, columns) of patches, as a stack.

    A token is a merge unit: the 2 × 2 patches, side by side in x "b v 4·d", that the merger joins into one visual token.
    Units are kept or cut whole, in raster order. There is no class token: all units are reference tokens.
    """

    def __init__(self, tower: Any, grid: Grid) -> None:
        self.tower, self.grid, self.unit = tower, grid, tower.spatial_merge_unit
        self.blocks = tower.blocks
        self.depth = self.read = len(self.blocks)  # the merger reads the last
        # Qwen2.5-VL attends in windows but for a few layers; Qwen3-VL everywhere.
        self.whole = getattr(tower, "fullatt_block_indexes", range(self.depth))
        self.taps = list(getattr(tower, "deepstack_visual_indexes", ()))
        thw = torch.tensor([grid], device=tower.device)
        units = grid[0] * grid[1] * grid[2] // self.unit
        self.frame = torch.arange(units, device=tower.device) // (units // grid[0])
        self.window, self.rank = self.frame, torch.arange(units, device=tower.device)
        if hasattr(tower, "window_size"):
            order, bounds = get_vision_window_index(
                thw,
                spatial_merge_size=tower.spatial_merge_size,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
            )
            order = order.to(tower.device)
            counts = (bounds[1:] - bounds[:-1]).to(tower.device) // self.unit
            windows = torch.arange(len(counts), device=tower.device).repeat_interleave(counts)
            self.rank = order.argsort()  # where the model's own forward puts each unit
            self.window = windows[self.rank]
        places = get_vision_position_ids(thw, tower.spatial_merge_size)
        self.rope = [t.view(units, self.unit, -1) for t in tower.rotary_pos_emb(self.frame, places)]
        self._packing: tuple[Tensor, Packing] | None = None

    def embed(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        """Patches of b images "b p i" as units "b v 4·d"."""
        if grid is not None:
            raise ValueError(
                "this tower reads images at their own size; shrink them with the processor's size settings"
            )
        b = patches.shape[0]
        x = self.tower.patch_embed(patches.flatten(0, 1).to(self.tower.dtype))
        if hasattr(self.tower, "pos_embed"):
            index, weight = get_vision_interpolation_indices_and_weights(
                torch.tensor([self.grid] * b, device=x.device),
                num_grid_per_side=self.tower.num_grid_per_side,
                mode=self.tower.interpolation_mode,
                align_corners=self.tower.interpolation_align_corners,
                spatial_merge_size=self.tower.spatial_merge_size,
            )
            x = x + (self.tower.pos_embed(index) * weight[:, :, None]).sum(1).to(x.dtype)
        return patch_tokens(x.view(b, -1, self.unit * x.shape[-1]), 0, False, patches)

    def _pack(self, tokens: Tokens) -> Packing:
        """Real units in the order of the model's own forward, computed once between two cuts."""
        if self._packing is None or self._packing[0] is not tokens.position:
            image = torch.arange(len(tokens.x), device=tokens.x.device)[:, None]
            order = (self.rank[tokens.position] + image * len(self.rank)).flatten().argsort(stable=True)
            order = order[tokens.valid.flatten()[order]]
            position = tokens.position.flatten()[order]
            rope = tuple(t[position].flatten(0, 1) for t in self.rope)
            inside = torch.full_like(tokens.position, -1).flatten()
            inside[order] = torch.arange(len(order), device=order.device)
            whole = self._pieces(self.frame, order, position, tokens)
            windows = whole if self.window is self.frame else self._pieces(self.window, order, position, tokens)
            self._packing = tokens.position, Packing(order, rope, inside.view_as(tokens.position), whole, windows)
        return self._packing[1]

    def _pieces(self, piece: Tensor, order: Tensor, position: Tensor, tokens: Tokens) -> Pieces:
        number = piece[position] + order // tokens.x.shape[1] * len(piece)
        _, number, counts = torch.unique_consecutive(number, return_inverse=True, return_counts=True)
        bounds = torch.nn.functional.pad((counts * self.unit).cumsum(0, dtype=torch.int32), (1, 0))
        return Pieces(number, bounds)

    def _open(self, layer: int, tokens: Tokens) -> tuple[Tensor, Packing, Pieces, dict[str, Any]]:
        """Input "p d" of a layer's attention: the packed units, their packing, its pieces (the units that attend to each
        other), and the attention's arguments for whole pieces."""
        packing, width = self._pack(tokens), tokens.x.shape[2]
        pieces = packing.whole if layer in self.whole else packing.windows
        x = tokens.x.reshape(-1, width)[packing.order].view(-1, width // self.unit)
        arguments = {"cu_seqlens": pieces.bounds, "position_embeddings": packing.rope}
        return self.blocks[layer].norm1(x), packing, pieces, arguments

    def _record(self, qkv: QKV, layer: int, packing: Packing, pieces: Pieces, bias: Tensor | None) -> Attention:
        scale, bias = self.blocks[layer].attn.scaling, None if bias is None else bias[None]
        return WindowAttention(*qkv, scale, bias, unit=self.unit, inside=packing.inside, window=pieces.number)

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        attention = self.blocks[layer].attn
        x, packing, pieces, arguments = self._open(layer, tokens)
        order, bias, masks = packing.order, log_size(tokens, layer, proportional), None
        if bias is not None:
            check_kernel(attention.config._attn_implementation, biased=True)
            bias = bias.flatten()[order].repeat_interleave(self.unit)
            keys = bias.to(x.dtype).split(arguments["cu_seqlens"].diff().tolist())
            masks = iter([key.expand(1, 1, len(key), -1) for key in keys])
        output, qkv = attend(attention, x, masks=masks, **arguments)
        added = torch.zeros_like(tokens.x).flatten(0, 1)
        added[order] = output.view(len(order), -1)
        return tokens.x + added.view_as(tokens.x), self._record(qkv, layer, packing, pieces, bias)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        x, packing, pieces, arguments = self._open(layer, tokens)
        everything = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)  # one piece shows all q, k and v
        qkv = peek(self.blocks[layer].attn, x, **arguments | {"cu_seqlens": everything})
        return self._record(qkv, layer, packing, pieces, None)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.blocks[layer]
        patches = x.reshape(-1, x.shape[2] // self.unit)
        return (patches + block.mlp(block.norm2(patches))).view_as(x)

    def norm(self, x: Tensor) -> Tensor:
        """Return `x` as it is: these towers end without a norm, and the merger has its own."""
        return x

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        if layer not in self.taps:
            return tokens
        # DeepStack: this layer's merged patches are added behind an early layer of the language model.
        merger = self.tower.deepstack_merger_list[self.taps.index(layer)]
        return with_feature(tokens, merged(merger, tokens.x, self.unit))


def merged(merger: Any, x: Tensor, unit: int) -> Tensor:
    """Merge units "b v 4·d" into visual tokens "b v D"."""
    b, v, width = x.shape
    return merger(x.reshape(b * v * unit, width // unit)).view(b, v, -1)


class QwenVLAdapter(VLMAdapter):
    """The tower, its merger as the projector, and three-axis positions.

    There is no class token: the mean over the units that are left is the global feature.
    """

    renumbers = False
    counts_padding = False

    def __init__(self, model: Any) -> None:
        self.model, self.core, self.tower = model, model.model, model.model.visual
        self.kinds: dict[Grid, tuple[Layout, QwenVit]] = {}

    def image_inputs(self, input_ids: Tensor, inputs: dict) -> list[ImageInput]:
        pixels, grids = inputs.get("pixel_values"), inputs.get("image_grid_thw")
        if pixels is None or grids is None:
            return []
        if sum(rows * columns for _, rows, columns in self.kinds) > MOST:
            self.kinds.clear()
        rows = pixels.split(grids.prod(1).tolist())
        return [ImageInput(tuple(grid), patches[None]) for grid, patches in zip(grids.tolist(), rows, strict=True)]

    def _of(self, kind: Grid) -> tuple[Layout, QwenVit]:
        if kind not in self.kinds:
            sizes = of_grid(self.model.config, kind)
            slots = torch.arange(sizes.patches, device=self.model.device)
            self.kinds[kind] = Layout(sizes, slots), QwenVit(self.tower, kind)
        return self.kinds[kind]

    def layout(self, kind: Grid) -> Layout:
        return self._of(kind)[0]

    def stack(self, kind: Grid) -> QwenVit:
        return copy(self._of(kind)[1])  # what it remembers of a batch ends with the batch

    def projector_input(self, tokens: Tokens) -> Tensor:
        return tokens.x

    def project(self, features: Tensor) -> Tensor:
        return merged(self.tower.merger, features, self.tower.spatial_merge_unit)

    def global_feature(self, stack: QwenVit, tokens: Tokens) -> Tensor:
        return mean_of_real(tokens.of_visual(tokens.x), tokens)

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, given: Tensor | None, inputs: dict) -> Tensor:
        if given is None and inputs.get("image_grid_thw") is not None:
            # Rows and columns of images are axes of their own, as in the model's own forward.
            given = self.core.compute_3d_position_ids(
                input_ids=input_ids,
                image_grid_thw=inputs["image_grid_thw"],
                video_grid_thw=None,
                inputs_embeds=None,
                attention_mask=attention_mask,
                mm_token_type_ids=inputs.get("mm_token_type_ids"),
                **cache_argument(None),
            )
        given = default_positions(input_ids) if given is None else given
        if given.ndim == 3 and given.shape[0] == 4:
            given = given[1:]  # the first is the text's own count, for packed sequences
        return given.expand(3, *input_ids.shape)


def of_grid(config: Any, grid: Grid) -> Shape:
    """Sizes for an image of (frames, rows, columns) patches."""
    vision, (frames, rows, columns) = config.vision_config, grid
    heads, width, unit = vision.num_heads, vision.hidden_size, vision.spatial_merge_size**2
    windows, whole = frames, ()
    if window := getattr(vision, "window_size", None):
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
        language=decoder_layers(config),
        vocabulary=config.text_config.vocab_size,
        columns=columns // vision.spatial_merge_size,
        unit=unit,
        taps=tuple(getattr(vision, "deepstack_visual_indexes", ())),
        by_image=True,
        resizable=False,
    )


@register_family("qwen2_5_vl", "qwen3_vl")
class QwenVL(Family):
    """Qwen2.5-VL and Qwen3-VL in their transformers form."""

    adapter = QwenVLAdapter

    def shape(self, model: Any, image: tuple[int, int] | None = None) -> Shape:
        """Sizes of a model or of its config for an image of `image` (height, width) pixels."""
        config = getattr(model, "config", model)
        patch = config.vision_config.patch_size
        step = patch * config.vision_config.spatial_merge_size
        height, width = image or USUAL
        if height % step or width % step:
            raise ModelError(
                f"image={height} × {width} pixels: both must be multiples of {step}, one visual token's side"
            )
        return of_grid(config, (1, height // patch, width // patch))
