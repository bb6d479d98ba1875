"""transformers' DINOv2: layer scale, a class token, and a last norm over all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ivtp.backbones import VisionRun
from ivtp.backbones.clip_vit import sample_number, score_bias, shrink, spread
from ivtp.backbones.replacing import replaced
from ivtp.backbones.transformers_attention import attend, check_kernel, key_mask, peek
from ivtp.pruning.attention import Attention
from ivtp.pruning.cost import Layers, Shape
from ivtp.pruning.pruner import Plan
from ivtp.pruning.tokens import Facts, Tokens
from ivtp.pruning.traverse import traverse


class Dinov2Vit:
    """A `Dinov2Model` as a stack; `features` are the 0-based layers whose outputs leave it, joined in width."""

    def __init__(self, tower: nn.Module, features: tuple[int, ...] = ()) -> None:
        self.tower, self.layers, self.features = tower, tower.encoder.layer, features
        self.depth = len(self.layers)
        self.scale = (tower.config.hidden_size // tower.config.num_attention_heads) ** -0.5

    def embed(self, pixel_values: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        """Patches behind the class token "b 1+v d"; `grid`: of an image shrunk to such rows and columns."""
        embeddings = self.tower.embeddings
        patch = embeddings.patch_embeddings.patch_size
        image = pixel_values.to(embeddings.cls_token.dtype)
        full = (image.shape[-2] // patch[0], image.shape[-1] // patch[1])
        if grid is not None:
            image = shrink(image, grid, patch)
        x = embeddings(image)
        place = torch.arange(x.shape[1], device=x.device)[None]
        tokens = Tokens.of(
            x,
            visual=place > 0,
            reference=place == 0,
            position=(place - 1).expand(x.shape[0], -1),
            sample=sample_number(pixel_values),
            facts=Facts(x.shape[1] - 1, lone=True, lead=1),
        )
        return tokens if grid is None else spread(tokens, grid, full)

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block = self.layers[layer]
        bias = tokens.size.log() if proportional and layer > 0 else None
        kernel = self.tower.config._attn_implementation
        mask = key_mask(kernel, tokens.valid, tokens.x.shape[1], False, bias, tokens.x.dtype, tokens.facts.padded)
        # Before transformers 5.24 the module takes no mask, so that its kernel is given it.
        output, qkv = attend(block.attention, block.norm1(tokens.x), masks=iter([mask]))
        x = tokens.x + block.drop_path(block.layer_scale1(output))
        return x, Attention(*qkv, self.scale, score_bias(tokens, bias))

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block = self.layers[layer]
        return Attention(*peek(block.attention, block.norm1(tokens.x)), self.scale, score_bias(tokens, None))

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.layers[layer]
        return x + block.drop_path(block.layer_scale2(block.mlp(block.norm2(x))))

    def norm(self, x: Tensor) -> Tensor:
        return self.tower.layernorm(x)

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        if layer in self.features:
            feature = tokens.x if tokens.feature is None else torch.cat([tokens.feature, tokens.x], -1)
            tokens = replace(tokens, feature=feature)
        return tokens


def shape(model) -> Shape:
    """Sizes of a `Dinov2Model` or of its config."""
    config = getattr(model, "config", model)
    width, heads, side = config.hidden_size, config.num_attention_heads, config.patch_size
    inner = int(width * config.mlp_ratio)
    if config.use_swiglu_ffn:  # two thirds, rounded up to eights
        inner = (inner * 2 // 3 + 7) // 8 * 8
    layers = Layers(
        config.num_hidden_layers, width, inner, heads, heads, width // heads, 3 if config.use_swiglu_ffn else 2
    )
    return Shape(layers, (config.image_size // side) ** 2, config.num_channels * side * side, prefix=1, has_cls=True)


def resize(model: nn.Module, side: int) -> None:
    """Resize the position embeddings once, in the model's own way, to those of square images of `side` pixels."""
    embeddings, patch = model.embeddings, model.config.patch_size
    tokens = (side // patch) ** 2 + 1
    blank = embeddings.position_embeddings.new_empty(1, tokens, model.config.hidden_size)
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(blank, side, side)
    embeddings.position_embeddings = nn.Parameter(positions, requires_grad=False)
    model.config.image_size = side


@contextmanager
def prune(model: nn.Module, plan: Plan, instruction, read_at: int, part) -> Iterator[VisionRun]:
    run, stack = VisionRun(), Dinov2Vit(model)
    check_kernel(model.config._attn_implementation, biased=bool(plan.vision and plan.vision.proportional))

    def forward(pixel_values=None, **unused):
        for wish in ("output_attentions", "output_hidden_states"):
            if unused.get(wish):
                raise ValueError(
                    f"{wish}=True: layers have different lengths under pruning; use the run's trace instead"
                )
        for mask in ("bool_masked_pos", "attention_mask"):
            if unused.get(mask) is not None:
                raise ValueError(f"a masked DINOv2 forward cannot be pruned; call the model without {mask}")
        with part("vision"):
            tokens, run.vision = traverse(stack, stack.embed(pixel_values, plan.image), plan.vision, part)
            states = stack.norm(tokens.x)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])

    with replaced(model, forward=forward):
        yield run
