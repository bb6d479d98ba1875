"""timm's `VisionTransformer`, with class token or average pooling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from timm.layers import Format
from torch import Tensor, nn

from ivtp.backbones import VisionRun, replaced
from ivtp.backbones.clip_vit import sample_number, score_bias, shrink, spread
from ivtp.pruning.attention import Attention
from ivtp.pruning.cost import Layers, Shape
from ivtp.pruning.pruner import Plan
from ivtp.pruning.tokens import Tokens
from ivtp.pruning.traverse import traverse


class TimmVit:
    """A timm `VisionTransformer` as a stack.

    Without a class token every patch refers: a patch's importance is the attention it gets from all of them, which is
    what average pooling reads. Register tokens are neither pruned nor asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.depth = len(model.blocks)
        for block in model.blocks:
            if not all(hasattr(block, name) for name in ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")):
                raise TypeError(f"timm block {type(block).__name__} cannot be opened between attention and FFN")
            if not all(hasattr(block.attn, name) for name in ("qkv", "q_norm", "k_norm", "scale")):
                raise TypeError(f"timm attention {type(block.attn).__name__} does not show q, k and v")

    def embed(self, image: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        """Patches behind class and register tokens, "b p+v d"; `grid`: of an image shrunk to such rows and columns."""
        embed = self.model.patch_embed
        if grid is None:
            x = self.model._pos_embed(embed(image))
        else:
            with ExitStack() as stack:
                for module, name, value in (
                    (embed, "strict_img_size", False),
                    (embed, "flatten", False),
                    (embed, "output_fmt", Format.NHWC),
                    (self.model, "dynamic_img_size", True),
                ):
                    stack.enter_context(replaced(module, value, name))
                x = self.model._pos_embed(embed(shrink(image, grid, embed.patch_size)))
        x = self.model.norm_pre(self.model.patch_drop(x))
        prefix = self.model.num_prefix_tokens
        place = torch.arange(x.shape[1], device=x.device)[None]
        has_cls = self.model.cls_token is not None
        tokens = Tokens.of(
            x,
            visual=place >= prefix,
            reference=(place == 0) if has_cls else (place >= prefix),
            position=(place - prefix).expand(x.shape[0], -1),
            sample=sample_number(image),
        )
        return tokens if grid is None else spread(tokens, grid, embed.grid_size)

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block = self.model.blocks[layer]
        bias = score_bias(tokens, tokens.size.log() if proportional and layer > 0 else None)
        mask = None if bias is None else bias[:, None, None, :].to(tokens.x.dtype)
        with recorded(block.attn) as seen:
            x = tokens.x + block.drop_path1(block.ls1(block.attn(block.norm1(tokens.x), attn_mask=mask)))
        return x, Attention(*qkv(seen), block.attn.scale, bias)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block = self.model.blocks[layer]
        with recorded(block.attn, only=True) as seen, suppress(_Enough):
            block.attn(block.norm1(tokens.x))
        return Attention(*qkv(seen), block.attn.scale, score_bias(tokens, None))

    def norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.model.blocks[layer]
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        return tokens


class _Enough(Exception):
    """Nothing more of a layer has to be computed."""


@contextmanager
def recorded(attn: nn.Module, only: bool = False) -> Iterator[dict[str, Tensor]]:
    """What the parts of a timm attention module give out; `only`: the module stops once q, k and v are known."""
    seen: dict[str, Tensor] = {}

    def record(name: str):
        def hook(_, __, out):
            seen[name] = out
            if only and len(seen) == 3:
                raise _Enough

        return hook

    hooks = [getattr(attn, name).register_forward_hook(record(name)) for name in ("qkv", "q_norm", "k_norm")]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def qkv(seen: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v "b h n e"; v comes with the joint projection."""
    q, k = seen["q_norm"], seen["k_norm"]
    b, h, n, e = q.shape
    return q, k, seen["qkv"].view(b, n, 3, h, e)[:, :, 2].transpose(1, 2)


def mean_for_padding(x: Tensor, tokens: Tokens) -> Tensor:
    """Padding becomes the mean of its sample's real patches, so that an average over all places is that of those."""
    if bool(tokens.valid.all()):
        return x
    real = (tokens.visual & tokens.valid)[:, :, None].to(x.dtype)
    mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return torch.where(tokens.valid[:, :, None], x, mean)


def shape(model) -> Shape:
    """Sizes of a timm `VisionTransformer`."""
    block = model.blocks[0]
    heads, head_width = block.attn.num_heads, block.attn.head_dim
    layers = Layers(len(model.blocks), model.embed_dim, block.mlp.fc1.out_features, heads, heads, head_width, 2)
    projection = model.patch_embed.proj
    inputs = projection.in_channels * projection.kernel_size[0] * projection.kernel_size[1]
    return Shape(
        layers,
        model.patch_embed.num_patches,
        inputs,
        prefix=model.num_prefix_tokens,
        has_cls=model.cls_token is not None,
        classes=getattr(model.head, "out_features", 0),
        columns=model.patch_embed.grid_size[1],
    )


@contextmanager
def prune(model: nn.Module, plan: Plan, instruction, read_at: int, part) -> Iterator:
    run = VisionRun()
    stack = TimmVit(model)

    def forward_features(image, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal:
            raise ValueError("a masked timm forward cannot be pruned; call the model without attn_mask and is_causal")
        with part("vision"):
            tokens, run.vision = traverse(stack, stack.embed(image, plan.image), plan.vision, part)
            left[:] = [tokens]
            return model.norm(tokens.x)

    def pool(x, *args, **kwargs):
        return plain_pool(mean_for_padding(x, left[0]), *args, **kwargs)

    left: list[Tokens] = []
    plain_pool = model.pool
    with replaced(model, forward_features, "forward_features"), replaced(model, pool, "pool"):
        yield run
