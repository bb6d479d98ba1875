"""The vision tower of InternVL in transformers: a class token, and patches that pixel shuffle joins by 2 × 2."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ivtp.backbones.clip_vit import sample_number, score_bias
from ivtp.backbones.transformers_attention import attend, key_mask, peek
from ivtp.backbones.units import UnitAttention
from ivtp.pruning.attention import Attention
from ivtp.pruning.tokens import Tokens, take


class InternVit:
    """An `InternVLVisionModel` as a stack.

    A visual token is the 2 × 2 patches that pixel shuffle joins, side by side in x "b 1+v 4·d" (of the class token only
    the first d count); they are kept or cut together. Inside, patches stand in raster order, as the model has them.

    feature  the 0-based layer whose output leaves the tower; depth: behind the last norm
    """

    def __init__(self, tower: nn.Module, feature: int, side: int) -> None:
        self.tower, self.feature, self.side = tower, feature, side
        self.layers = tower.encoder.layer
        self.depth = len(self.layers)
        self.unit = side * side
        rows, columns = tower.embeddings.patch_embeddings.patch_shape
        grid = torch.arange(rows * columns, device=tower.device).view(rows // side, side, columns // side, side)
        self.places = grid.transpose(1, 2).reshape(-1, self.unit)  # of every unit's patches in the raster
        self._order: tuple[Tensor, Tensor] | None = None

    def embed(self, pixel_values: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        if grid is not None:
            raise ValueError("this tower joins patches by pixel shuffle and reads no shrunk image")
        x = self.tower.embeddings(pixel_values.to(self.tower.dtype))
        units = x[:, 1:][:, self.places].flatten(2)
        cls = torch.nn.functional.pad(x[:, :1], (0, units.shape[2] - x.shape[2]))
        place = torch.arange(units.shape[1] + 1, device=x.device)[None]
        return Tokens.of(
            torch.cat([cls, units], 1),
            visual=place > 0,
            reference=place == 0,
            position=(place - 1).expand(x.shape[0], -1),
            sample=sample_number(pixel_values),
        )

    def _raster(self, tokens: Tokens) -> Tensor:
        """For each patch in raster order its place behind the class token, "b 4·v"."""
        if self._order is None or self._order[0] is not tokens.position:
            self._order = tokens.position, self.places[tokens.position[:, 1:]].flatten(1).argsort(1)
        return self._order[1]

    def _open(self, x: Tensor, order: Tensor) -> Tensor:
        """Tokens "b 1+v 4·d" → the class token and patches in raster order "b 1+4·v d"."""
        width = x.shape[2] // self.unit
        return torch.cat([x[:, :1, :width], take(x[:, 1:].reshape(x.shape[0], -1, width), order)], 1)

    def _close(self, patches: Tensor, order: Tensor) -> Tensor:
        """The way back."""
        b, _, width = patches.shape
        units = take(patches[:, 1:], order.argsort(1)).reshape(b, -1, width * self.unit)
        return torch.cat([torch.nn.functional.pad(patches[:, :1], (0, width * (self.unit - 1))), units], 1)

    def _spread(self, values: Tensor, order: Tensor) -> Tensor:
        """Of every token "b 1+v" to its patches in raster order "b 1+4·v"."""
        return torch.cat([values[:, :1], values[:, 1:].repeat_interleave(self.unit, 1).gather(1, order)], 1)

    def _attention(self, qkv, layer: int, tokens: Tokens, bias: Tensor | None, order: Tensor) -> Attention:
        back = torch.cat([torch.zeros_like(order[:, :1]), order.argsort(1) + 1], 1)
        q, k, v = (t.gather(2, back[:, None, :, None].expand_as(t)) for t in qkv)
        bias = score_bias(tokens, bias)
        if bias is not None:
            bias = torch.cat([bias[:, :1], bias[:, 1:].repeat_interleave(self.unit, 1)], 1)
        return UnitAttention(q, k, v, self.layers[layer].attention.scale, bias, unit=self.unit, prefix=1)

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block, order = self.layers[layer], self._raster(tokens)
        patches = self._open(tokens.x, order)
        bias = tokens.size.log() if proportional and layer > 0 else None
        kernel = block.attention.config._attn_implementation
        spread = None if bias is None else self._spread(bias, order)
        valid = self._spread(tokens.valid, order)
        mask = key_mask(kernel, valid, patches.shape[1], False, spread, patches.dtype)
        output, qkv = attend(block.attention, block.layernorm_before(patches), attention_mask=mask)
        x = self._close(block.lambda_1 * output + patches, order)
        return x, self._attention(qkv, layer, tokens, bias, order)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block, order = self.layers[layer], self._raster(tokens)
        qkv = peek(block.attention, block.layernorm_before(self._open(tokens.x, order)), attention_mask=None)
        return self._attention(qkv, layer, tokens, None, order)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.layers[layer]
        b, n, width = x.shape
        each = x.view(b, n, self.unit, width // self.unit)
        cls, patches = each[:, :1, :1].flatten(1, 2), each[:, 1:].flatten(1, 2)
        y = torch.cat([cls, patches], 1)
        y = block.lambda_2 * block.dropout(block.mlp(block.layernorm_after(y))) + y
        units = y[:, 1:].reshape(b, n - 1, width)
        return torch.cat([torch.nn.functional.pad(y[:, :1], (0, width - width // self.unit)), units], 1)

    def norm(self, x: Tensor) -> Tensor:
        """The last norm, over every patch of a unit."""
        return self.tower.layernorm(x.unflatten(-1, (self.unit, -1))).flatten(-2)

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        if layer == self.feature:
            return replace(tokens, feature=tokens.x)
        if layer == self.depth - 1 and self.feature == self.depth:
            return replace(tokens, feature=self.norm(tokens.x))
        return tokens
