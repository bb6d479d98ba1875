"""Vision towers of transformers whose patches stand in a row: CLIP, SigLIP and DINOv2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ivtp.backbones.family import Family, PruneOptions, layers_of, register_family
from ivtp.backbones.hooks.attention_interface import QKV, attend, check_kernel, key_mask, peek, refuse_layer_outputs
from ivtp.backbones.hooks.padding import log_size, masked, score_bias
from ivtp.backbones.hooks.replacing import replaced
from ivtp.backbones.vision.patches import VisionRun, patch_tokens, shrink, spread, with_feature
from ivtp.core.attention import Attention
from ivtp.core.flops import Layers, Shape
from ivtp.core.plan import NOTHING, Stage
from ivtp.core.tokens import Tokens


class ClipVit:
    """A `CLIPVisionModel`, or a tower of the same layers without class token (`SiglipVisionModel`), as a stack.

    `features` are the 0-based layers whose outputs leave it, joined in width. The class token is the reference token;
    without one all patches are: a patch's importance is then its mean attention over all queries.
    """

    norms, attention = ("layer_norm1", "layer_norm2"), "self_attn"

    def __init__(self, model: Any, features: tuple[int, ...] = ()) -> None:
        self.tower = getattr(model, "vision_model", model)
        self.layers = self.tower.encoder.layers
        self.depth, self.features = len(self.layers), features
        self.read = features[-1] + 1 if features else self.depth
        self.prefix = int(hasattr(self.tower.embeddings, "class_embedding"))

    def embed(
        self, pixels: Tensor, grid: tuple[int, int] | None = None, interpolate_pos_encoding: bool = False, **_: Any
    ) -> Tokens:
        """Patches behind the class token, if any, "b p+v d"; `grid`: rows and columns that the image is shrunk to."""
        embeddings = self.tower.embeddings
        image = pixels.to(embeddings.patch_embedding.weight.dtype)
        if grid is not None:
            image = shrink(image, grid, (embeddings.patch_size,) * 2)
        x = embeddings(image, interpolate_pos_encoding=interpolate_pos_encoding or grid is not None)
        if self.prefix:
            x = self.tower.pre_layrnorm(x)
        side = embeddings.image_size // embeddings.patch_size
        return spread(patch_tokens(x, self.prefix, self.prefix > 0, pixels), grid, (side, side))

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        bias = log_size(tokens, layer, proportional)
        # The mask goes to the kernel directly: before transformers 5.24 DINOv2's module takes none.
        masks = iter([self._mask(tokens, tokens.x.shape[1], bias)])
        output, qkv = attend(*self._attention(layer, tokens.x), masks=masks)
        return tokens.x + self._branch(layer, 1, output), self._record(layer, qkv, tokens, bias)

    def class_token(self, tokens: Tokens, stage: Stage | None) -> Tensor:
        """Class token "b d" behind the last norm, of tokens that left the tower under a stage: the layers that nobody read
        are run, the last of them for the class token alone."""
        stage = NOTHING if stage is None else stage
        attended, fed = stage.schedule.reach(self.read)
        last, x = self.depth - 1, tokens.x
        for layer in range(fed, last):
            x = x if layer < attended else self.attend(layer, tokens.with_x(x), stage.proportional)[0]
            x = self.mlp(layer, x)
        cls = x[:, :1]
        if attended <= last:
            module, states = self._attention(last, x)
            bias = log_size(tokens, last, stage.proportional)
            _, keys, values = peek(module, states)
            masks = iter([self._mask(tokens, 1, bias)])
            output, _ = attend(module, states[:, :1], masks=masks, keys_values=(keys, values))
            cls = cls + self._branch(last, 1, output)
        if fed <= last:
            cls = self.mlp(last, cls)
        return self.norm(cls[:, 0])

    def _mask(self, tokens: Tokens, queries: int, bias: Tensor | None) -> Tensor | None:
        kernel = self.tower.config._attn_implementation
        return key_mask(kernel, tokens.valid, queries, False, bias, tokens.x.dtype, tokens.facts.padded)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        return self._record(layer, peek(*self._attention(layer, tokens.x)), tokens, None)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.layers[layer]
        return x + self._branch(layer, 2, block.mlp(getattr(block, self.norms[1])(x)))

    def _attention(self, layer: int, x: Tensor) -> tuple[nn.Module, Tensor]:
        """The attention module of a layer, and its input."""
        block = self.layers[layer]
        return getattr(block, self.attention), getattr(block, self.norms[0])(x)

    def _branch(self, layer: int, branch: int, output: Tensor) -> Tensor:
        """Output of attention (1) or FFN (2) as it is added to the residual."""
        return output

    def _record(self, layer: int, qkv: QKV, tokens: Tokens, bias: Tensor | None) -> Attention:
        return Attention(*qkv, qkv[0].shape[-1] ** -0.5, score_bias(tokens, bias))

    def norm(self, x: Tensor) -> Tensor:
        return self.tower.post_layernorm(x)

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        return with_feature(tokens, tokens.x) if layer in self.features else tokens

    def pool(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """Hidden states "b n d" and the pooled vector "b d" that the model's own forward returns: CLIP's class token behind
        the last norm, or SigLIP's pooling head over the tokens that are left."""
        if self.prefix:
            return tokens.x, self.norm(tokens.x[:, 0])
        x = self.norm(tokens.x)
        if not self.tower.use_head:
            return x, None
        with masked(self.tower.head.attention, key_padding_mask=~tokens.valid if tokens.facts.padded else None):
            return x, self.tower.head(x)


class Dinov2Vit(ClipVit):
    """A `Dinov2Model` as a stack: layer scale, a class token, and a last norm over all tokens."""

    norms, attention = ("norm1", "norm2"), "attention"

    def __init__(self, model: Any, features: tuple[int, ...] = ()) -> None:
        self.tower, self.layers, self.features = model, model.encoder.layer, features
        self.depth, self.prefix = len(self.layers), 1
        self.read = features[-1] + 1 if features else self.depth

    def embed(self, pixels: Tensor, grid: tuple[int, int] | None = None, **masks: Any) -> Tokens:
        for mask in ("bool_masked_pos", "attention_mask"):
            if masks.get(mask) is not None:
                raise ValueError(f"a masked DINOv2 forward cannot be pruned; call the model without {mask}")
        embeddings = self.tower.embeddings
        patch = embeddings.patch_embeddings.patch_size
        image = pixels.to(embeddings.cls_token.dtype)
        full = (image.shape[-2] // patch[0], image.shape[-1] // patch[1])
        x = embeddings(image if grid is None else shrink(image, grid, patch))
        return spread(patch_tokens(x, 1, True, pixels), grid, full)

    def _branch(self, layer: int, branch: int, output: Tensor) -> Tensor:
        block = self.layers[layer]
        return block.drop_path(getattr(block, f"layer_scale{branch}")(output))

    def norm(self, x: Tensor) -> Tensor:
        return self.tower.layernorm(x)

    def pool(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        states = self.norm(tokens.x)
        return states, states[:, 0]


def resize(model: Any, side: int) -> None:
    """Resize a DINOv2's position embeddings once, in the model's own way, to those of square images of `side` pixels."""
    embeddings, patch = model.embeddings, model.config.patch_size
    tokens = (side // patch) ** 2 + 1
    blank = embeddings.position_embeddings.new_empty(1, tokens, model.config.hidden_size)
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(blank, side, side)
    embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)
    model.config.image_size = side


@register_family("clip", "clip_vision_model")
class Clip(Family):
    """CLIP of transformers, whole or its vision tower alone."""

    stack, prefix = ClipVit, 1

    def shape(self, model: Any, image: tuple[int, int] | None = None) -> Shape:
        """Sizes of a tower, of the whole model (with the projection of its images; texts are read once, not for every
        image), or of the config of either."""
        whole = getattr(model, "config", model)
        config = getattr(whole, "vision_config", whole)
        return Shape(
            self.layers(config),
            (config.image_size // config.patch_size) ** 2,
            config.num_channels * config.patch_size**2,
            prefix=self.prefix,
            has_cls=self.prefix > 0,
            classes=whole.projection_dim if whole is not config and self.prefix else 0,
        )

    def layers(self, config: Any) -> Layers:
        """Sizes of the tower's layers."""
        return layers_of(config)

    @contextmanager
    def prune(self, model: nn.Module, planner: Any, options: PruneOptions) -> Iterator[VisionRun]:
        run, stack = VisionRun(planner, options), self.stack(model)
        stage = run.plan.vision
        check_kernel(stack.tower.config._attn_implementation, biased=bool(stage and stage.proportional))

        def forward(pixel_values: Tensor, **arguments: Any) -> BaseModelOutputWithPooling:
            refuse_layer_outputs(arguments)
            with run.part("vision"):
                states, pooled = stack.pool(run.through(stack, pixel_values, **arguments))
            return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)

        with replaced(stack.tower, forward=forward):
            yield run


@register_family("siglip", "siglip_vision_model")
class Siglip(Clip):
    """SigLIP of transformers, whole or its vision tower alone."""

    prefix = 0

    def shape(self, model: Any, image: tuple[int, int] | None = None) -> Shape:
        """Sizes as of a CLIP, the pooling head included."""
        sizes, config = super().shape(model), getattr(model, "config", model)
        # Older versions have no such entry, and always a head.
        headed = getattr(getattr(config, "vision_config", config), "vision_use_head", True)
        return replace(sizes, pool=replace(sizes.vision, depth=1)) if headed else sizes


@register_family("dinov2")
class Dinov2(Clip):
    """DINOv2 of transformers."""

    stack = Dinov2Vit

    def layers(self, config: Any) -> Layers:
        ffn, gated = int(config.hidden_size * config.mlp_ratio), config.use_swiglu_ffn
        if gated:  # two thirds, rounded up to eights
            ffn = (ffn * 2 // 3 + 7) // 8 * 8
        return layers_of(config, ffn, gated)
