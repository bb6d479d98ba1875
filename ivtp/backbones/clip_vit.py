"""transformers' CLIP vision tower, and what towers built like it have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ivtp.backbones import VisionRun
from ivtp.backbones.replacing import replaced
from ivtp.backbones.transformers_attention import attend, check_kernel, key_mask, peek
from ivtp.pruning.attention import Attention
from ivtp.pruning.cost import Layers, Shape
from ivtp.pruning.pruner import Plan
from ivtp.pruning.scores import mix
from ivtp.pruning.tokens import Facts, Tokens
from ivtp.pruning.traverse import traverse


def sample_number(pixel_values: Tensor) -> Tensor:
    """A number "b" from the content of each image, the same in whatever batch the image comes."""
    bits = pixel_values.flatten(1).float().view(torch.int32).long()
    return mix((bits * (2 * torch.arange(bits.shape[1], device=bits.device) + 1)).sum(1))


def shrink(image: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """The image at `grid` rows and columns of patches of so many pixels."""
    size = (grid[0] * patch[0], grid[1] * patch[1])
    return torch.nn.functional.interpolate(image.float(), size, mode="bicubic", antialias=True).to(image.dtype)


def spread(tokens: Tokens, grid: tuple[int, int], full: tuple[int, int]) -> Tokens:
    """Positions of a small grid's tokens in the full one that it was shrunk from: the middle of what each covers."""
    rows, columns = full
    row = (2 * torch.arange(grid[0], device=tokens.x.device) + 1) * rows // (2 * grid[0])
    column = (2 * torch.arange(grid[1], device=tokens.x.device) + 1) * columns // (2 * grid[1])
    place = (row[:, None] * columns + column).flatten().expand(len(tokens.x), -1)
    size = torch.full_like(place, rows * columns / place.shape[1], dtype=tokens.size.dtype)
    index = tokens.visual_index
    return replace(tokens, position=tokens.position.scatter(1, index, place), size=tokens.size.scatter(1, index, size))


class ClipVit:
    """A `CLIPVisionModel`, or a tower of the same layers without class token (SigLIP), as a stack.

    `features` are the 0-based layers whose outputs leave it, joined in width. The class token refers; without one every
    patch does: a patch's importance is the attention it gets from all of them, the mean over all queries.
    """

    def __init__(self, tower: nn.Module, features: tuple[int, ...] = ()) -> None:
        self.tower = getattr(tower, "vision_model", tower)
        self.layers = self.tower.encoder.layers
        self.depth = len(self.layers)
        self.features = features
        self.prefix = int(hasattr(self.tower.embeddings, "class_embedding"))

    def embed(self, pixel_values: Tensor, grid: tuple[int, int] | None = None, **kwargs) -> Tokens:
        """Patches, behind the class token if any, "b p+v d"; `grid`: of an image shrunk to such rows and columns."""
        dtype = self.tower.embeddings.patch_embedding.weight.dtype
        image = pixel_values.to(dtype)
        if grid is not None:
            image = shrink(image, grid, (self.tower.embeddings.patch_size,) * 2)
            kwargs["interpolate_pos_encoding"] = True
        x = self.tower.embeddings(image, **kwargs)
        if self.prefix:
            x = self.tower.pre_layrnorm(x)
        place = torch.arange(x.shape[1], device=x.device)[None]
        # Patches count from 0, so that a position is a place in the image; the class token stands before it.
        tokens = Tokens.of(
            x,
            visual=place >= self.prefix,
            reference=place == 0 if self.prefix else place >= 0,
            position=(place - self.prefix).expand(x.shape[0], -1),
            sample=sample_number(pixel_values),
            facts=Facts(x.shape[1] - self.prefix, lone=self.prefix > 0, lead=self.prefix),
        )
        side = self.tower.embeddings.image_size // self.tower.embeddings.patch_size
        return tokens if grid is None else spread(tokens, grid, (side, side))

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block = self.layers[layer]
        bias = tokens.size.log() if proportional and layer > 0 else None
        kernel = block.self_attn.config._attn_implementation
        mask = key_mask(kernel, tokens.valid, tokens.x.shape[1], False, bias, tokens.x.dtype, tokens.facts.padded)
        output, (q, k, v) = attend(block.self_attn, block.layer_norm1(tokens.x), attention_mask=mask)
        return tokens.x + output, Attention(q, k, v, block.self_attn.scale, score_bias(tokens, bias))

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block = self.layers[layer]
        q, k, v = peek(block.self_attn, block.layer_norm1(tokens.x), attention_mask=None)
        return Attention(q, k, v, block.self_attn.scale, score_bias(tokens, None))

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.layers[layer]
        return x + block.mlp(block.layer_norm2(x))

    def norm(self, x: Tensor) -> Tensor:
        return self.tower.post_layernorm(x)

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        if layer in self.features:
            feature = tokens.x if tokens.feature is None else torch.cat([tokens.feature, tokens.x], -1)
            tokens = replace(tokens, feature=feature)
        return tokens


def score_bias(tokens: Tokens, bias: Tensor | None) -> Tensor | None:
    """What is added to the logits of every query: the log sizes, and -inf on padding; None where that is nothing."""
    if not tokens.facts.padded:
        return bias
    bias = torch.zeros_like(tokens.size) if bias is None else bias
    return bias.masked_fill(~tokens.valid, float("-inf"))


def shape(model, prefix: int = 1) -> Shape:
    """Sizes of a CLIP vision tower, of a whole CLIP (with the projection of its images; texts are read once, not for
    every image), or of the config of either; `prefix`: 0 for a tower without class token."""
    whole = getattr(model, "config", model)
    config = getattr(whole, "vision_config", whole)
    heads = config.num_attention_heads
    width = config.hidden_size
    side = config.patch_size
    layers = Layers(config.num_hidden_layers, width, config.intermediate_size, heads, heads, width // heads, 2)
    patches = (config.image_size // side) ** 2
    classes = whole.projection_dim if whole is not config and prefix else 0
    inputs = config.num_channels * side * side
    return Shape(layers, patches, inputs, prefix=prefix, has_cls=prefix > 0, classes=classes)


def pool(tower: nn.Module, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The states as they are "b n d", and the class token behind the last norm "b d"."""
    return tokens.x, tower.post_layernorm(tokens.x[:, 0])


@contextmanager
def prune(model: nn.Module, plan: Plan, instruction, read_at: int, part, pool: Callable = pool) -> Iterator:
    """`pool`: what the tower gives out of what the layers left, its states and its pooled output."""
    run, tower = VisionRun(), getattr(model, "vision_model", model)
    check_kernel(tower.config._attn_implementation, biased=bool(plan.vision and plan.vision.proportional))

    def forward(pixel_values=None, interpolate_pos_encoding=False, **unused):
        for wish in ("output_attentions", "output_hidden_states"):
            if unused.get(wish):
                raise ValueError(
                    f"{wish}=True: layers have different lengths under pruning; use the run's trace instead"
                )
        stack = ClipVit(model)
        with part("vision"):
            tokens = stack.embed(pixel_values, plan.image, interpolate_pos_encoding=interpolate_pos_encoding)
            tokens, run.vision = traverse(stack, tokens, plan.vision, part)
            states, pooled = pool(stack.tower, tokens)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)

    with replaced(tower, forward=forward):
        yield run
