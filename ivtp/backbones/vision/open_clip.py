"""open_clip's `VisionTransformer`, alone or inside a `CLIP` or `CustomTextCLIP`; towers from timm are pruned as timm's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.backbones.family import Family, ModelError, PruneOptions, register_family
from ivtp.backbones.hooks.padding import log_size, mean_for_padding, score_bias
from ivtp.backbones.hooks.replacing import own, replaced, set_to
from ivtp.backbones.vision.patches import VisionRun, patch_tokens, shrink, spread
from ivtp.backbones.vision.timm import Timm, check
from ivtp.core.attention import Attention
from ivtp.core.flops import Layers, Shape
from ivtp.core.tokens import Tokens


class Projected(Attention):
    """An attention record whose q, k and v are projected when a score first reads them.

    torch's `nn.MultiheadAttention` runs as one kernel that exposes none of its own. A layer that is read therefore costs
    its projections once more, and a layer that is not read costs nothing.
    """

    def __init__(self, project: Callable[[], tuple[Tensor, ...]], scale: float, bias: Tensor | None) -> None:
        vars(self).update(project=project, scale=scale, bias=bias, causal=False)

    def __getattr__(self, name: str) -> Tensor:
        if name not in ("q", "k", "v"):
            raise AttributeError(name)
        vars(self).update(zip("qkv", vars(self)["project"](), strict=True))
        return vars(self)[name]


class OpenClipVit:
    """An open_clip `VisionTransformer` as a stack; its class token is the reference token, also where patches are averaged."""

    def __init__(self, model: Any) -> None:
        self.model, self.blocks = model, model.transformer.resblocks
        self.depth = self.read = len(self.blocks)

    def embed(self, image: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        """Patches behind the class token, "b 1+v d"; `grid`: rows and columns that the image is shrunk to."""
        model = self.model
        image = image.to(model.conv1.weight.dtype)
        if grid is None:
            return patch_tokens(model._embeds(image), 1, True, image)
        # open_clip resizes its position embeddings when it loads a checkpoint: bicubic, antialiased.
        table = model.positional_embedding
        patches = table[1:].T.reshape(1, -1, *model.grid_size)
        # In float32: not every device interpolates narrower numbers.
        patches = nn.functional.interpolate(patches.float(), grid, mode="bicubic", antialias=True, align_corners=False)
        small = nn.Parameter(torch.cat([table[:1], patches.to(table).flatten(2)[0].T]), requires_grad=False)
        with set_to(small, model, "positional_embedding"):
            x = model._embeds(shrink(image, grid, model.patch_size))
        return spread(patch_tokens(x, 1, True, image), grid, model.grid_size)

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block = self.blocks[layer]
        merged = proportional and bool((tokens.size != 1).any())  # else the module's own kernel serves
        bias = score_bias(tokens, log_size(tokens, layer, merged))
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

        def project() -> tuple[Tensor, ...]:
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


def tower(model: Any) -> Any:
    """The image tower that is opened: open_clip's own, or the timm model inside its `TimmModel`.

    Raises ModelError for a tower that would have to be opened in another way.
    """
    visual = getattr(model, "visual", model)
    if hasattr(visual, "trunk"):
        check(visual.trunk)
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


@register_family("open_clip.VisionTransformer", "open_clip.TimmModel", "open_clip.CLIP", "open_clip.CustomTextCLIP")
class OpenClip(Family):
    """open_clip's models, whole or their image towers alone."""

    def shape(self, model: Any, image: tuple[int, int] | None = None) -> Shape:
        """Sizes of the image tower and of its projection; class names are read once, not for every image."""
        visual = tower(model)
        if hasattr(visual, "blocks"):
            sizes = Timm().shape(visual)
            head = getattr(getattr(model, "visual", model), "head", nn.Identity())
            products = sum(m.in_features * m.out_features for m in head.modules() if isinstance(m, nn.Linear))
            return replace(sizes, classes=sizes.classes + products // sizes.vision.width)
        blocks = visual.transformer.resblocks
        attn, ffn, heads = blocks[0].attn, blocks[0].mlp.c_fc.out_features, blocks[0].attn.num_heads
        layers = Layers(len(blocks), visual.transformer.width, ffn, heads, heads, attn.head_dim, 2)
        rows, columns = visual.grid_size
        inputs = visual.conv1.in_channels * visual.patch_size[0] * visual.patch_size[1]
        classes = 0 if visual.proj is None else visual.proj.shape[1]
        return Shape(layers, rows * columns, inputs, classes=classes, columns=columns)

    @contextmanager
    def prune(self, model: Any, planner: Any, options: PruneOptions) -> Iterator[VisionRun]:
        visual = tower(model)
        if hasattr(visual, "blocks"):
            with Timm().prune(visual, planner, options) as run:
                yield run
            return
        run, stack = VisionRun(planner, options), OpenClipVit(visual)

        def forward(image: Tensor):
            with run.part("vision"):
                run.tokens = run.through(stack, image)
                pooled, patches = visual._pool(run.tokens.x)
                if visual.proj is not None:
                    pooled = pooled @ visual.proj
            return (pooled, patches) if visual.output_tokens else pooled

        def pool(x: Tensor) -> Tensor:
            return plain_pool(mean_for_padding(x, run.tokens, prefix=False))

        plain_pool = own(visual, "_global_pool")
        with replaced(visual, forward=forward, _global_pool=pool):
            yield run
