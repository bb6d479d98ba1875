"""InternVL (2.5, 3, 3.5) in its transformers form: crops and a thumbnail, pixel shuffle, a Qwen or Llama decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ivtp.backbones.family import Family, ModelError, layers_of, register_family, shape_of
from ivtp.backbones.hooks.attention_interface import QKV, attend, key_mask, peek
from ivtp.backbones.hooks.padding import log_size, score_bias
from ivtp.backbones.language.llama import decoder_layers
from ivtp.backbones.vision.patches import patch_tokens
from ivtp.backbones.vision.units import UnitAttention
from ivtp.backbones.vlm.adapter import ImageInput, Layout, VLMAdapter
from ivtp.core.attention import Attention
from ivtp.core.flops import Shape
from ivtp.core.tokens import Tokens, take


class Raster(NamedTuple):
    """Raster order of the patches of units that are left: place, unit by unit, of each patch in raster order "b 4·v", and
    `back`, its inverse."""

    order: Tensor
    back: Tensor


class InternVit:
    """An `InternVLVisionModel` as a stack.

    A visual token is the 2 × 2 patches that pixel shuffle joins, side by side in x "b 1+v 4·d" (of the class token only
    the first d count); they are kept or cut together. Inside, patches stand in raster order, as the model has them.

    feature  the 0-based layer whose output leaves the tower; depth: behind the last norm
    """

    def __init__(self, tower: Any, feature: int, side: int) -> None:
        self.tower, self.feature, self.unit = tower, feature, side * side
        self.layers = tower.encoder.layer
        self.depth = len(self.layers)
        self.read = min(feature + 1, self.depth)
        rows, columns = tower.embeddings.patch_embeddings.patch_shape
        grid = torch.arange(rows * columns, device=tower.device).view(rows // side, side, columns // side, side)
        self.places = grid.transpose(1, 2).reshape(-1, self.unit)  # of every unit's patches in the raster
        self._order: tuple[Tensor, Raster] | None = None

    def embed(self, pixels: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        if grid is not None:
            raise ValueError("this tower joins patches by pixel shuffle and reads no shrunk image")
        x = self.tower.embeddings(pixels.to(self.tower.dtype))
        x = torch.cat([x[:, :1], x[:, 1:][:, self.places.flatten()]], 1)
        return patch_tokens(self._close(x), 1, True, pixels)

    def _raster(self, tokens: Tokens) -> Raster:
        """Raster order of the patches that are left, computed once between two cuts."""
        if self._order is None or self._order[0] is not tokens.position:
            order = self.places[tokens.position[:, 1:]].flatten(1).argsort(1)
            self._order = tokens.position, Raster(order, order.argsort(1))
        return self._order[1]

    def _open(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Split tokens "b 1+v 4·d" into the class token and patches "b 1+4·v d", by default unit by unit."""
        width = x.shape[2] // self.unit
        patches = x[:, 1:].reshape(len(x), -1, width)
        return torch.cat([x[:, :1, :width], patches if order is None else take(patches, order)], 1)

    def _close(self, x: Tensor, back: Tensor | None = None) -> Tensor:
        """Join patches into tokens: the inverse of `_open`."""
        width = x.shape[2] * self.unit
        patches = x[:, 1:] if back is None else take(x[:, 1:], back)
        cls = torch.nn.functional.pad(x[:, :1], (0, width - x.shape[2]))
        return torch.cat([cls, patches.reshape(len(x), -1, width)], 1)

    def _spread(self, values: Tensor, order: Tensor | None = None) -> Tensor:
        """Copy a value of every token "b 1+v" to its patches "b 1+4·v", by default unit by unit."""
        patches = values[:, 1:].repeat_interleave(self.unit, 1)
        return torch.cat([values[:, :1], patches if order is None else patches.gather(1, order)], 1)

    def _record(self, qkv: QKV, layer: int, tokens: Tokens, bias: Tensor | None, raster: Raster) -> Attention:
        bias = score_bias(tokens, bias)
        bias = None if bias is None else self._spread(bias, raster.order)
        places = torch.nn.functional.pad(raster.back + 1, (1, 0))
        return UnitAttention(*qkv, self.layers[layer].attention.scale, bias, unit=self.unit, prefix=1, places=places)

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block, raster = self.layers[layer], self._raster(tokens)
        order = raster.order
        patches, bias = self._open(tokens.x, order), log_size(tokens, layer, proportional)
        kernel = block.attention.config._attn_implementation
        spread = None if bias is None else self._spread(bias, order)
        valid, padded = self._spread(tokens.valid, order), tokens.facts.padded
        mask = key_mask(kernel, valid, patches.shape[1], False, spread, patches.dtype, padded)
        output, qkv = attend(block.attention, block.layernorm_before(patches), attention_mask=mask)
        x = self._close(block.lambda_1 * output + patches, raster.back)
        return x, self._record(qkv, layer, tokens, bias, raster)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block, raster = self.layers[layer], self._raster(tokens)
        qkv = peek(block.attention, block.layernorm_before(self._open(tokens.x, raster.order)), attention_mask=None)
        return self._record(qkv, layer, tokens, None, raster)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block, patches = self.layers[layer], self._open(x)
        return self._close(block.lambda_2 * block.dropout(block.mlp(block.layernorm_after(patches))) + patches)

    def norm(self, x: Tensor) -> Tensor:
        """Apply the last norm to every patch of a unit."""
        return self.tower.layernorm(x.unflatten(-1, (self.unit, -1))).flatten(-2)

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        if layer == self.feature:
            return replace(tokens, feature=tokens.x)
        if layer == self.depth - 1 and self.feature == self.depth:
            return replace(tokens, feature=self.norm(tokens.x))
        return tokens


class InternVLAdapter(VLMAdapter):
    """An image is a run of image tokens: its crops, and behind several of them the thumbnail that shows the whole.

    The model itself treats all crops of a batch alike and does not know their images.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.core, self.config = model, model.model, model.config
        self.side = round(1 / self.config.downsample_ratio)
        self.feature = feature_layer(self.config)
        if self.feature < 0:
            raise ValueError(
                f"vision_feature_layer={self.config.vision_feature_layer} is the embeddings, before any layer that could prune"
            )
        if self.config.vision_feature_select_strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy={self.config.vision_feature_select_strategy!r} passes the class token "
                "on as an image token; pruning supports 'default' (patches only)"
            )
        self.of_crop = shape_of(model)
        self.layouts: dict[int, Layout] = {}

    def image_inputs(self, input_ids: Tensor, inputs: dict) -> list[ImageInput]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        crops = [length / self.of_crop.patches for length in runs(input_ids == self.config.image_token_id)]
        if sum(crops) != len(pixels) or any(count != int(count) for count in crops):
            raise ValueError(
                f"{len(pixels)} crops, but the prompts have image tokens for {sum(crops):g}; let the processor write the "
                f"prompts, {self.of_crop.patches} image tokens for each crop"
            )
        return [ImageInput(len(rows), rows) for rows in pixels.split([int(count) for count in crops])]

    def layout(self, kind: int) -> Layout:
        if kind not in self.layouts:
            sizes = replace(self.of_crop, crops=kind, by_image=True)
            self.layouts[kind] = Layout(sizes, torch.arange(sizes.tokens, device=self.model.device), base=kind - 1)
        return self.layouts[kind]

    def stack(self, kind: int) -> InternVit:
        return InternVit(self.core.vision_tower, self.feature, self.side)

    def global_feature(self, stack: InternVit, tokens: Tokens) -> Tensor:
        """The class token four times, in place of four patches (ours: pixel shuffle leaves it out)."""
        cls = self.projector_input(tokens)[:, 0].unflatten(1, (stack.unit, -1))[:, 0]
        return cls.repeat(1, stack.unit)


def feature_layer(config: Any) -> int:
    """The 0-based tower layer whose output is read; as many as there are: behind the last norm; -1: the embeddings."""
    depth, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    return depth if layer == -1 else layer % (depth + 1) - 1  # hidden_states[i] is the input of layer i


def runs(image: Tensor) -> list[int]:
    """Lengths of the runs of image tokens, prompt after prompt."""
    between = torch.nn.functional.pad(image, (0, 1)).flatten()  # no run goes on into the next prompt
    kind, counts = torch.unique_consecutive(between, return_counts=True)
    return counts[kind].tolist()


@register_family("internvl")
class InternVL(Family):
    """InternVL in its transformers form."""

    adapter = InternVLAdapter

    def shape(self, model: Any, image: tuple[int, int] | None = None) -> Shape:
        """Sizes of a model or of its config, for one crop, or for an image of `image` (height, width) pixels in crops and,
        where there are several, with a thumbnail."""
        config = getattr(model, "config", model)
        vision, side = config.vision_config, round(1 / config.downsample_ratio)
        if vision.model_type != "internvl_vision":
            raise ModelError(f"an InternVL with vision_config of type {vision.model_type!r} cannot be pruned")
        rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
        crops = 1
        if image is not None:
            tall, wide = (max(1, round(size / side)) for size, side in zip(image, vision.image_size, strict=True))
            crops = tall * wide + (tall * wide > 1)
        return Shape(
            layers_of(vision),
            rows * columns // side**2,
            vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
            read=min(feature_layer(config) + 1, vision.num_hidden_layers),
            projector_in=vision.hidden_size * side**2,
            language=decoder_layers(config),
            vocabulary=config.text_config.vocab_size,
            columns=columns // side,
            unit=side**2,
            crops=crops,
            by_image=True,
            resizable=False,
        )
