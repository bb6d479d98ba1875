"""timm's `VisionTransformer` and `Eva` (EVA-02 and others with rotary positions): class token or pooling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from timm.layers.format import Format
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ivtp.backbones.family import Family, ModelError, PruneOptions, register_family
from ivtp.backbones.hooks.padding import log_size, masked, mean_for_padding, score_bias
from ivtp.backbones.hooks.replacing import own, replaced, set_to
from ivtp.backbones.vision.patches import VisionRun, patch_tokens, shrink, spread
from ivtp.core.attention import Attention
from ivtp.core.flops import Layers, Shape
from ivtp.core.tokens import Tokens


class _Enough(Exception):
    """Signal that no more of a layer has to be computed."""


class _Kernel(TorchFunctionMode):
    """Mode that records the (q, k, v) of `scaled_dot_product_attention`; `only`: the code behind them does not run."""

    def __init__(self, only: bool = False) -> None:
        super().__init__()
        self.only = only
        self.qkv: tuple[Any, Any, Any] = (None, None, None)

    def __torch_function__(self, function, types, args: Any = (), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            self.qkv = args[:3]
            if self.only:
                raise _Enough
        return function(*args, **(kwargs or {}))


class TimmVit:
    """A timm `VisionTransformer` or `Eva` as a stack.

    Without a class token every patch is a reference token: a patch's importance is then its mean attention over all
    patches, as average pooling reads them. Register tokens are neither pruned nor reference tokens. A patch keeps its own
    rotary position until the end.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.prefix = model, model.num_prefix_tokens
        self.depth = self.read = len(model.blocks)
        self.rope: Tensor | None = None  # of the patches of this batch: "v 2e", or per layer and head "l h v 2e"
        self.row = torch.empty(0)  # of `rope`, for each place in the image

    def embed(self, image: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        """Patches behind class and register tokens, "b p+v d"; `grid`: rows and columns that the image is shrunk to."""
        embed = self.model.patch_embed
        if grid is None:
            x = self.model._pos_embed(embed(image))
        else:
            with self._sized(grid):
                x = self.model._pos_embed(embed(shrink(image, grid, embed.patch_size)))
        if isinstance(x, tuple):
            x, self.rope = x
        x = self.model.norm_pre(x)
        tokens = spread(patch_tokens(x, self.prefix, self.model.cls_token is not None, image), grid, embed.grid_size)
        patch = tokens.position[0, self.prefix :]
        self.row = torch.zeros(embed.num_patches, dtype=torch.long, device=x.device)
        self.row[patch] = torch.arange(len(patch), device=x.device)
        return tokens

    @contextmanager
    def _sized(self, grid: tuple[int, int]) -> Iterator[None]:
        """Context in which the model takes images of another grid and resizes its position embeddings in its own way."""
        embed, rope = self.model.patch_embed, getattr(self.model, "rope", None)
        with ExitStack() as stack:
            for module, name, value in (
                (embed, "strict_img_size", False),
                (embed, "flatten", False),
                (embed, "output_fmt", Format.NHWC),
                (self.model, "dynamic_img_size", True),
            ):
                stack.enter_context(set_to(value, module, name))
            if rope is not None and getattr(rope, "feat_shape", None) is not None:
                stack.callback(rope.update_feat_shape, rope.feat_shape)
                rope.update_feat_shape(list(grid))
            yield

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block = self.model.blocks[layer]
        bias = score_bias(tokens, log_size(tokens, layer, proportional))
        mask = None if bias is None else bias[:, None, None, :].to(tokens.x.dtype)
        with _Kernel() as kernel:
            output = block.attn(block.norm1(tokens.x), attn_mask=mask, **self._rotary(layer, tokens))
        x = tokens.x + block.drop_path1(scaled(block, 1, output))
        return x, Attention(*kernel.qkv, block.attn.scale, bias)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block = self.model.blocks[layer]
        with suppress(_Enough), _Kernel(only=True) as kernel:
            block.attn(block.norm1(tokens.x), **self._rotary(layer, tokens))
        return Attention(*kernel.qkv, block.attn.scale, score_bias(tokens, None))

    def _rotary(self, layer: int, tokens: Tokens) -> dict[str, Tensor]:
        """Rotary position of each patch, "b 1 v 2e" or "b h v 2e"; empty for a model without."""
        if self.rope is None:
            return {}
        rope = self.rope[layer] if self.model.rope_mixed else self.rope[None]
        return {"rope": rope[:, self.row[tokens.position[:, self.prefix :]]].transpose(0, 1)}

    def norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.model.blocks[layer]
        return x + block.drop_path2(scaled(block, 2, block.mlp(block.norm2(x))))

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        return tokens


BLOCKS = ("Block", "EvaBlock")
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")


def check(model: Any) -> None:
    """Raise ModelError for a model whose layers would have to be opened, or counted, in another way."""
    kv_heads = set()
    for block in model.blocks:
        if type(block).__name__ not in BLOCKS:
            raise ModelError(
                f"timm block {type(block).__name__} cannot be opened between attention and FFN; supported: "
                + ", ".join(BLOCKS)
            )
        attn = block.attn
        if type(attn).__name__ not in ATTENTIONS or getattr(attn, "gate", None) is not None:
            raise ModelError(
                f"timm attention {type(attn).__name__}{' with a gate' * hasattr(attn, 'gate')} is not known; supported: "
                f"{', '.join(ATTENTIONS)}, without a gate"
            )
        if not attn.fused_attn:
            raise ModelError(
                "timm was told not to fuse attention, so that nobody sees q, k and v; leave TIMM_FUSED_ATTN=0 out"
            )
        kv_heads.add(getattr(attn, "num_kv_heads", attn.num_heads))
    if len(kv_heads) > 1:
        raise ModelError(f"timm blocks with {sorted(kv_heads)} key heads are not counted; supported: as many in each")
    pool = model.attn_pool
    if pool is not None and (type(pool).__name__ != "AttentionPoolLatent" or pool.latent_len > 1):
        raise ModelError(
            f"timm pooling {type(pool).__name__} is not known; supported: class token, avg, max, avgmax, and map with "
            "one query"
        )


def scaled(block: Any, branch: int, y: Tensor) -> Tensor:
    """Apply the layer scale of a block's first (attention) or second (FFN) branch, under either of its names."""
    if hasattr(block, f"ls{branch}"):
        return getattr(block, f"ls{branch}")(y)
    gamma = getattr(block, f"gamma_{branch}")
    return y if gamma is None else gamma * y


def pools_prefix(model: Any) -> bool:
    """Return whether pooling reads class and register tokens too; `Eva` has no such setting, and its attention pool reads all."""
    return getattr(model, "pool_include_prefix", model.attn_pool is not None)


@register_family("timm.VisionTransformer", "timm.Eva")
class Timm(Family):
    """timm's transformers."""

    def shape(self, model: Any, image: tuple[int, int] | None = None) -> Shape:
        """Sizes of a timm `VisionTransformer` or `Eva`."""
        check(model)
        attn, mlp, pool = model.blocks[0].attn, model.blocks[0].mlp, model.attn_pool
        kv_heads, inner = getattr(attn, "num_kv_heads", attn.num_heads), mlp.fc2.in_features
        matrices = 3 if hasattr(mlp, "fc1_g") or mlp.fc1.out_features == 2 * inner else 2
        layers = Layers(len(model.blocks), model.embed_dim, inner, attn.num_heads, kv_heads, attn.head_dim, matrices)
        if pool is not None:
            ffn = pool.mlp.fc1.out_features if pool.mlp is not None else 0
            pool = Layers(1, model.embed_dim, ffn, pool.num_heads, pool.num_heads, pool.head_dim, 2)
        heads = [getattr(model, name, None) for name in ("head", "head_dist")]  # DeiT's distilled ones have two
        projection = model.patch_embed.proj
        return Shape(
            layers,
            model.patch_embed.num_patches,
            projection.in_channels * projection.kernel_size[0] * projection.kernel_size[1],
            prefix=model.num_prefix_tokens,
            has_cls=model.cls_token is not None,
            pool=pool,
            pool_prefix=model.num_prefix_tokens if pools_prefix(model) else 0,
            classes=sum(getattr(head, "out_features", 0) for head in heads),
            columns=model.patch_embed.grid_size[1],
        )

    @contextmanager
    def prune(self, model: Any, planner: Any, options: PruneOptions) -> Iterator[VisionRun]:
        check(model)
        run, stack = VisionRun(planner, options), TimmVit(model)

        def forward_features(image: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            if attn_mask is not None or is_causal:
                raise ValueError(
                    "a masked timm forward cannot be pruned; call the model without attn_mask and is_causal"
                )
            with run.part("vision"):
                run.tokens = run.through(stack, image)
                return model.norm(run.tokens.x)

        def pool(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if model.attn_pool is None:
                return plain_pool(mean_for_padding(x, run.tokens, pools_prefix(model)), *args, **kwargs)
            bias = score_bias(run.tokens, None)
            if bias is not None:
                bias = bias[:, None, None, 0 if pools_prefix(model) else stack.prefix :].to(run.tokens.x.dtype)
            with masked(model.attn_pool, attn_mask=bias):
                return plain_pool(x, *args, **kwargs)

        plain_pool = own(model, "pool")
        with replaced(model, forward_features=forward_features, pool=pool):
            yield run
