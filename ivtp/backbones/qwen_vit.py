"""The vision towers of Qwen2.5-VL (windows) and Qwen3-VL (DeepStack): images at their own size, patches merged by 2 × 2."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from ivtp.backbones.clip_vit import sample_number
from ivtp.backbones.transformers_attention import attend, check_kernel, peek
from ivtp.backbones.units import WindowAttention
from ivtp.pruning.attention import Attention
from ivtp.pruning.tokens import Tokens


class QwenVit:
    """One size of images, `grid` = (frames, rows, columns) of patches, as a stack.

    A token is a merge unit: the 2 × 2 patches, side by side in x "b v 4·d", that the merger makes one visual token of.
    Units are kept or cut whole, in raster order. There is no class token: the mean of all units judges.
    """

    def __init__(self, tower: nn.Module, grid: tuple[int, int, int]) -> None:
        self.tower, self.grid = tower, grid
        self.blocks = tower.blocks
        self.depth = len(self.blocks)
        self.unit = tower.spatial_merge_unit
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
        self._packing: tuple[Tokens, tuple[Tensor, Tensor, tuple[Tensor, Tensor]]] | None = None

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
        x = x.view(b, -1, self.unit * x.shape[-1])
        everything = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device)
        return Tokens.of(x, visual=everything, reference=everything, sample=sample_number(patches))

    def _pack(self, tokens: Tokens) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Real units in the order of the model's own forward: flat places, tokens of the whole batch; and their rotary
        embedding "p e"."""
        if self._packing is None or self._packing[0] is not tokens.position:
            image = torch.arange(len(tokens.x), device=tokens.x.device)[:, None]
            order = (self.rank[tokens.position] + image * len(self.rank)).flatten().argsort(stable=True)
            order = order[tokens.valid.flatten()[order]]
            position = tokens.position.flatten()[order]
            rope = tuple(t[position].flatten(0, 1) for t in self.rope)
            self._packing = tokens.position, (order, position, rope)
        return self._packing[1]

    def _pieces(self, layer: int, order: Tensor, position: Tensor, v: int) -> tuple[Tensor, Tensor]:
        """Of what is packed: the number of the piece that each unit attends in, and how many units each piece has."""
        piece = self.frame if layer in self.whole else self.window
        number = piece[position] + order // v * len(piece)
        return torch.unique_consecutive(number, return_inverse=True, return_counts=True)[1:]

    def _record(self, qkv, layer: int, tokens: Tokens, order: Tensor, number: Tensor, bias: Tensor | None) -> Attention:
        inside = torch.full_like(tokens.position, -1).flatten()
        inside[order] = torch.arange(len(order), device=order.device)
        scale = self.blocks[layer].attn.scaling
        bias = None if bias is None else bias[None]
        inside = inside.view_as(tokens.position)
        return WindowAttention(*qkv, scale, bias, unit=self.unit, inside=inside, window=number)

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block, (b, v, width) = self.blocks[layer], tokens.x.shape
        order, position, rope = self._pack(tokens)
        number, counts = self._pieces(layer, order, position, v)
        x = tokens.x.reshape(b * v, width)[order].view(-1, width // self.unit)
        bounds = torch.nn.functional.pad((counts * self.unit).cumsum(0, dtype=torch.int32), (1, 0))
        bias, masks = None, None
        if proportional and layer > 0:
            check_kernel(block.attn.config._attn_implementation, biased=True)
            bias = tokens.size.log().flatten()[order].repeat_interleave(self.unit)
            keys = bias.to(x.dtype).split((counts * self.unit).tolist())
            masks = iter([key.expand(1, 1, len(key), -1) for key in keys])
        output, qkv = attend(block.attn, block.norm1(x), masks, cu_seqlens=bounds, position_embeddings=rope)
        added = torch.zeros_like(tokens.x).view(b * v, width)
        added[order] = output.view(-1, width)
        return tokens.x + added.view(b, v, width), self._record(qkv, layer, tokens, order, number, bias)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block, (b, v, width) = self.blocks[layer], tokens.x.shape
        order, position, rope = self._pack(tokens)
        number, _ = self._pieces(layer, order, position, v)
        x = tokens.x.reshape(b * v, width)[order].view(-1, width // self.unit)
        everything = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)  # one piece shows all q, k and v
        qkv = peek(block.attn, block.norm1(x), cu_seqlens=everything, position_embeddings=rope)
        return self._record(qkv, layer, tokens, order, number, None)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.blocks[layer]
        patches = x.reshape(-1, x.shape[2] // self.unit)
        return (patches + block.mlp(block.norm2(patches))).view_as(x)

    def norm(self, x: Tensor) -> Tensor:
        """The towers end without a norm; the merger has its own."""
        return x

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        if layer not in self.taps:
            return tokens
        # DeepStack: this layer's merged patches are added behind an early layer of the language model.
        tap = merged(self.tower.deepstack_merger_list[self.taps.index(layer)], tokens.x, self.unit)
        feature = tap if tokens.feature is None else torch.cat([tokens.feature, tap], -1)
        return replace(tokens, feature=feature)


def merged(merger: nn.Module, x: Tensor, unit: int) -> Tensor:
    """Units "b v 4·d" → visual tokens "b v D"."""
    b, v, width = x.shape
    return merger(x.reshape(b * v * unit, width // unit)).view(b, v, -1)
