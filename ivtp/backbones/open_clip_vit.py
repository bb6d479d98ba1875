"""open_clip's `VisionTransformer`, alone or inside a `CLIP` or `CustomTextCLIP`; towers from timm are pruned as timm's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ivtp.backbones import ModelError, VisionRun, timm_vit
from ivtp.backbones.clip_vit import sample_number, score_bias, shrink, spread
from ivtp.backbones.replacing import own, replaced, set_to
from ivtp.backbones.timm_vit import mean_for_padding
from ivtp.pruning.attention import Attention
from ivtp.pruning.cost import Layers, Shape
from ivtp.pruning.pruner import Plan
from ivtp.pruning.tokens import Tokens
from ivtp.pruning.traverse import traverse


class Projected(Attention):
    """A record whose q, k and v are projected when a score first asks for them.

    torch's `nn.MultiheadAttention` runs as one kernel that shows none of its own; so a layer that is read costs its
    projections once more, and one that is not costs nothing.
    """

    def __init__(self, project: Callable[[], tuple[Tensor, Tensor, Tensor]], scale: float, bias: Tensor | None) -> None:
        vars(self).update(project=project, scale=scale, bias=bias, causal=False)

    @cached_property
    def _qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.project()

    q = property(lambda self: self._qkv[0])
    k = property(lambda self: self._qkv[1])
    v = property(lambda self: self._qkv[2])


class OpenClipVit:
    """An open_clip `VisionTransformer` as a stack; its class token refers, also where the patches are averaged."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = model.transformer.resblocks
        self.depth = len(self.blocks)

    def embed(self, image: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        """Patches behind the class token, "b 1+v d"; `grid`: of an image shrunk to such rows and columns."""
        model = self.model
        image = image.to(model.conv1.weight.dtype)
        if grid is None:
            x = model._embeds(image)
        else:
            # open_clip resizes its position embeddings when it loads a checkpoint: bicubic, antialiased.
            table = model.positional_embedding
            patches = table[1:].T.reshape(1, -1, *model.grid_size)
            patches = nn.functional.interpolate(patches, grid, mode="bicubic", antialias=True, align_corners=False)
            small = nn.Parameter(torch.cat([table[:1], patches.flatten(2)[0].T]), requires_grad=False)
            with set_to(small, model, "positional_embedding"):
                x = model._embeds(shrink(image, grid, model.patch_size))
        place = torch.arange(x.shape[1], device=x.device)[None]
        tokens = Tokens.of(
            x,
            visual=place > 0,
            reference=place == 0,
            position=(place - 1).expand(x.shape[0], -1),
            sample=sample_number(image),
        )
        return tokens if grid is None else spread(tokens, grid, model.grid_size)

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block = self.blocks[layer]
        merged = proportional and layer > 0 and bool((tokens.size != 1).any())  # else the module's own kernel serves
        bias = score_bias(tokens, tokens.size.log() if merged else None)
        x = block.ln_1(tokens.x)
        record = self._record(layer, x, bias)
        if bias is None:
            output = block.attention(x)
        else:
            mask = bias[:, None, None].to(x.dtype)
            heads = nn.functional.scaled_dot_product_attention(record.q, record.k, record.v, attn_mask=mask)
            output = block.attn.out_proj(heads.transpose(1, 2).flatten(2))
        return tokens.x + block.ls_1(output), record

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        return self._record(layer, self.blocks[layer].ln_1(tokens.x), score_bias(tokens, None))

    def _record(self, layer: int, x: Tensor, bias: Tensor | None) -> Projected:
        attn = self.blocks[layer].attn

        def project() -> tuple[Tensor, Tensor, Tensor]:
            qkv = nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias)
            return qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

        return Projected(project, attn.head_dim**-0.5, bias)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.blocks[layer]
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def norm(self, x: Tensor) -> Tensor:
        return self.model.ln_post(x)

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        return tokens


def tower(model: nn.Module) -> nn.Module:
    """The image tower that is opened: open_clip's own, or the timm model inside its `TimmModel`.

    Raises ModelError for a tower that would have to be opened in another way.
    """
    visual = getattr(model, "visual", model)
    if hasattr(visual, "trunk"):
        timm_vit.check(visual.trunk)
        return visual.trunk
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", [])
    kinds = {type(block).__name__ for block in blocks} or {type(visual).__name__}
    if kinds != {"ResidualAttentionBlock"}:
        raise ModelError(
            f"open_clip's {', '.join(sorted(kinds))} cannot be opened between attention and FFN; supported: "
            "VisionTransformer of ResidualAttentionBlocks, and timm's transformers"
        )
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        raise ModelError(
            "open_clip's attention pooling (CoCa) is not known; supported: class token and average pooling"
        )
    if not visual.transformer.batch_first:
        raise ModelError("this open_clip tower runs with the batch second; create it with batch_first=True")
    return visual


def shape(model) -> Shape:
    """Sizes of the image tower and of its projection; class names are read once, not for every image."""
    visual = tower(model)
    if hasattr(visual, "blocks"):
        own = timm_vit.shape(visual)
        head = getattr(getattr(model, "visual", model), "head", nn.Identity())
        products = sum(m.in_features * m.out_features for m in head.modules() if isinstance(m, nn.Linear))
        return replace(own, classes=own.classes + products // own.vision.width)
    attn, width = visual.transformer.resblocks[0].attn, visual.transformer.width
    ffn = visual.transformer.resblocks[0].mlp.c_fc.out_features
    layers = Layers(len(visual.transformer.resblocks), width, ffn, attn.num_heads, attn.num_heads, attn.head_dim, 2)
    rows, columns = visual.grid_size
    inputs = visual.conv1.in_channels * visual.patch_size[0] * visual.patch_size[1]
    classes = 0 if visual.proj is None else visual.proj.shape[1]
    return Shape(layers, rows * columns, inputs, classes=classes, columns=columns)


@contextmanager
def prune(model: nn.Module, plan: Plan, instruction, read_at: int, part) -> Iterator:
    visual = tower(model)
    if hasattr(visual, "blocks"):
        with timm_vit.prune(visual, plan, instruction, read_at, part) as run:
            yield run
        return
    run = VisionRun()
    stack = OpenClipVit(visual)

    def forward(image):
        with part("vision"):
            tokens, run.vision = traverse(stack, stack.embed(image, plan.image), plan.vision, part)
            run.tokens = tokens
            pooled, patches = visual._pool(tokens.x)
            if visual.proj is not None:
                pooled = pooled @ visual.proj
        return (pooled, patches) if visual.output_tokens else pooled

    def pool(x):
        return plain_pool(mean_for_padding(x, run.tokens, prefix=False))

    plain_pool = own(visual, "_global_pool")
    with replaced(visual, forward=forward, _global_pool=pool):
        yield run
