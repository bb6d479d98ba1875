"""transformers' SigLIP vision tower: CLIP's layers without class token, pooled by attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from ivtp.backbones import clip_vit
from ivtp.backbones.clip_vit import ClipVit
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan
from ivtp.pruning.tokens import Tokens

SiglipVit = ClipVit
"""A `SiglipVisionModel` as a stack. It has no class token, so that every patch refers: whatever asks for the CLS row
of a method gets the mean of all queries' rows."""


def shape(model) -> Shape:
    """Sizes of a SigLIP vision tower, of a whole SigLIP, or of the config of either, its pooling head included."""
    sizes = clip_vit.shape(model, prefix=0)
    config = getattr(model, "config", model)
    headed = getattr(getattr(config, "vision_config", config), "vision_use_head", True)  # not said by older versions
    return replace(sizes, pool=replace(sizes.vision, depth=1)) if headed else sizes


def pool(tower: nn.Module, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """The states behind the last norm "b n d", and what the head's probe takes from those that are left "b d"."""
    x = tower.post_layernorm(tokens.x)
    if not tower.use_head:
        return x, None
    with unseen(tower.head.attention, tokens):
        return x, tower.head(x)


@contextmanager
def unseen(attention: nn.MultiheadAttention, tokens: Tokens) -> Iterator[None]:
    """Within the context the keys that are only padding are hidden from a pooling attention."""
    if not tokens.facts.padded:
        yield
        return
    mask = {"key_padding_mask": ~tokens.valid}
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | mask), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def prune(model: nn.Module, plan: Plan, instruction, read_at: int, part) -> AbstractContextManager:
    return clip_vit.prune(model, plan, instruction, read_at, part, pool)
