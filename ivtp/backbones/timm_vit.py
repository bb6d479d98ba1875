"""timm's `VisionTransformer` and `Eva` (EVA-02 and others with rotary positions): class token or pooling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from timm.layers import Format
from torch import Tensor, nn

from ivtp.backbones import ModelError, VisionRun, kernel_calls
from ivtp.backbones.clip_vit import sample_number, score_bias, shrink, spread
from ivtp.backbones.replacing import own, replaced, set_to
from ivtp.pruning.attention import Attention
from ivtp.pruning.cost import Layers, Shape
from ivtp.pruning.pruner import Plan
from ivtp.pruning.tokens import Tokens
from ivtp.pruning.traverse import traverse


class TimmVit:
    """A timm `VisionTransformer` or `Eva` as a stack.

    Without a class token every patch refers: a patch's importance is the attention it gets from all of them, which is
    what average pooling reads. Register tokens are neither pruned nor asked. Where positions are rotary, a patch keeps
    its own until the end.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.depth = len(model.blocks)
        self.rope: Tensor | None = None  # of the patches of this batch: "v 2e", or per layer and head "l h v 2e"
        self.row: Tensor | None = None  # of `rope`, for each place in the image

    def embed(self, image: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        """Patches behind class and register tokens, "b p+v d"; `grid`: of an image shrunk to such rows and columns."""
        embed = self.model.patch_embed
        if grid is None:
            x = self.model._pos_embed(embed(image))
        else:
            with self._sized(grid):
                x = self.model._pos_embed(embed(shrink(image, grid, embed.patch_size)))
        if isinstance(x, tuple):
            x, self.rope = x
        x = self.model.norm_pre(x)
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
        tokens = tokens if grid is None else spread(tokens, grid, embed.grid_size)
        patch = tokens.position[0, prefix:]
        self.row = torch.zeros(embed.num_patches, dtype=torch.long, device=x.device)
        self.row[patch] = torch.arange(len(patch), device=x.device)
        return tokens

    @contextmanager
    def _sized(self, grid: tuple[int, int]) -> Iterator[None]:
        """The model takes images of another grid, and resizes its position embeddings in its own way."""
        embed, rope = self.model.patch_embed, getattr(self.model, "rope", None)
        with ExitStack() as stack:
            for module, name, value in (
                (embed, "strict_img_size", False),
                (embed, "flatten", False),
                (embed, "output_fmt", Format.NHWC),
                (self.model, "dynamic_img_size", True),
            ):
                stack.enter_context(set_to(value, module, name))
            if getattr(rope, "feat_shape", None) is not None:
                stack.callback(rope.update_feat_shape, rope.feat_shape)
                rope.update_feat_shape(list(grid))
            yield

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block = self.model.blocks[layer]
        bias = score_bias(tokens, tokens.size.log() if proportional and layer > 0 else None)
        mask = None if bias is None else bias[:, None, None, :].to(tokens.x.dtype)
        x = block.norm1(tokens.x)
        output, qkv = kernel_calls.call(block.attn, x, attn_mask=mask, **self._rotary(layer, tokens))
        x = tokens.x + block.drop_path1(scaled(block, 1, output))
        return x, Attention(*qkv, block.attn.scale, bias)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block = self.model.blocks[layer]
        qkv = kernel_calls.peek(block.attn, block.norm1(tokens.x), **self._rotary(layer, tokens))
        return Attention(*qkv, block.attn.scale, score_bias(tokens, None))

    def _rotary(self, layer: int, tokens: Tokens) -> dict[str, Tensor]:
        """Each patch's own rotary position, "b 1 v 2e" or "b h v 2e"; nothing for a model without."""
        if self.rope is None:
            return {}
        rope = self.rope[layer] if self.model.rope_mixed else self.rope[None]
        rows = self.row[tokens.position[:, self.model.num_prefix_tokens :]]
        return {"rope": rope[:, rows].transpose(0, 1)}

    def norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.model.blocks[layer]
        return x + block.drop_path2(scaled(block, 2, block.mlp(block.norm2(x))))

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        return tokens


BLOCKS = ("Block", "EvaBlock")
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")


def check(model: nn.Module) -> None:
    """Raises ModelError for a model whose layers would have to be opened, or counted, in another way."""
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


def scaled(block: nn.Module, branch: int, y: Tensor) -> Tensor:
    """The block's layer scale of its first (attention) or second (FFN) branch, whatever it is called."""
    if hasattr(block, f"ls{branch}"):
        return getattr(block, f"ls{branch}")(y)
    gamma = getattr(block, f"gamma_{branch}")
    return y if gamma is None else gamma * y


def mean_for_padding(x: Tensor, tokens: Tokens, prefix: bool) -> Tensor:
    """Padding becomes the mean of its sample's real patches (`prefix`: and of what is before them), so that an average
    over all places is that of those."""
    if not tokens.facts.padded:
        return x
    real = ((tokens.visual | prefix) & tokens.valid)[:, :, None].to(x.dtype)
    mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return torch.where(tokens.valid[:, :, None], x, mean)


@contextmanager
def unseen(pool: nn.Module, tokens: Tokens, prefix: bool) -> Iterator[None]:
    """Within the context the keys that are only padding are hidden from timm's attention pooling."""
    bias = score_bias(tokens, None)
    if bias is None:
        yield
        return
    bias = bias if prefix else bias[:, int(tokens.visual[0].int().argmax()) :]
    mask = {"attn_mask": bias[:, None, None].to(tokens.x.dtype)}
    hook = pool.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | mask), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def shape(model) -> Shape:
    """Sizes of a timm `VisionTransformer` or `Eva`."""
    check(model)
    attn, mlp, pool = model.blocks[0].attn, model.blocks[0].mlp, model.attn_pool
    kv_heads, inner = getattr(attn, "num_kv_heads", attn.num_heads), mlp.fc2.in_features
    gated = hasattr(mlp, "fc1_g") or mlp.fc1.out_features == 2 * inner
    width, head_width = model.embed_dim, attn.head_dim
    layers = Layers(len(model.blocks), width, inner, attn.num_heads, kv_heads, head_width, 3 if gated else 2)
    if pool is not None:
        ffn = pool.mlp.fc1.out_features if pool.mlp is not None else 0
        pool = Layers(1, width, ffn, pool.num_heads, pool.num_heads, pool.head_dim, 2)
    heads = [getattr(model, name, None) for name in ("head", "head_dist")]  # DeiT's distilled ones have two
    projection = model.patch_embed.proj
    inputs = projection.in_channels * projection.kernel_size[0] * projection.kernel_size[1]
    return Shape(
        layers,
        model.patch_embed.num_patches,
        inputs,
        prefix=model.num_prefix_tokens,
        has_cls=model.cls_token is not None,
        pool=pool,
        pool_prefix=model.num_prefix_tokens if pools_prefix(model) else 0,
        classes=sum(getattr(head, "out_features", 0) for head in heads),
        columns=model.patch_embed.grid_size[1],
    )


def pools_prefix(model: nn.Module) -> bool:
    """Whether pooling reads class and register tokens too; `Eva` does not ask, and gives its attention pool all."""
    return getattr(model, "pool_include_prefix", model.attn_pool is not None)


@contextmanager
def prune(model: nn.Module, plan: Plan, instruction, read_at: int, part) -> Iterator:
    check(model)
    run = VisionRun()
    stack = TimmVit(model)

    def forward_features(image, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal:
            raise ValueError("a masked timm forward cannot be pruned; call the model without attn_mask and is_causal")
        with part("vision"):
            tokens, run.vision = traverse(stack, stack.embed(image, plan.image), plan.vision, part)
            run.tokens = tokens
            return model.norm(tokens.x)

    def pool(x, *args, **kwargs):
        if model.attn_pool is None:
            return plain_pool(mean_for_padding(x, run.tokens, pools_prefix(model)), *args, **kwargs)
        with unseen(model.attn_pool, run.tokens, pools_prefix(model)):
            return plain_pool(x, *args, **kwargs)

    plain_pool = own(model, "pool")
    with replaced(model, forward_features=forward_features, pool=pool):
        yield run
