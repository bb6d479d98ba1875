"""Every vision tower of the tests: what it answers, and the same from its own modules on all tokens under a mask."""

from __future__ import annotations

import torch

from helpers.place import reference
from helpers.reference import clip_states, dinov2_linears, dinov2_states, open_clip_states, siglip_states, timm_features
from ivtp.backbones.vision.open_clip import OpenClipVit
from ivtp.backbones.vision.timm import TimmVit
from ivtp.backbones.vision.transformers import ClipVit, Dinov2Vit


def is_timm(kind: str) -> bool:
    return kind.startswith("timm")


def stack_of(kind: str, model):
    stacks = {"timm": TimmVit, "clip": ClipVit, "siglip": ClipVit, "openclip": OpenClipVit, "dinov2": Dinov2Vit}
    return stacks[kind.partition("_")[0]](model)


def answers(kind: str, model, pixels):
    """States "b n d", and what is made of them: a class or pooled vector "b c"."""
    if is_timm(kind):
        return model.forward_features(pixels), model(pixels)
    if kind.startswith("openclip"):
        states, pool = [], model._pool
        model._pool = lambda x: (states.append(x), pool(x))[1]
        pooled = model(pixels)
        del model._pool
        return states[0], pooled
    out = model(pixels)
    return out.last_hidden_state, out.pooler_output


@reference
def masked(kind: str, model, pixels, cuts):
    """The states of the unmodified modules on all tokens, those that a cut removed hidden from then on."""
    if is_timm(kind):
        return timm_features(model, pixels, cuts)
    if kind.startswith("openclip"):
        return open_clip_states(model, pixels, cuts)
    if kind.startswith("dinov2"):
        return model.layernorm(dinov2_states(model, pixels, cuts)[-1])
    return siglip_states(model, pixels, cuts) if kind.startswith("siglip") else clip_states(model, pixels, cuts)[-1]


@reference
def pooled(kind: str, model, states):
    """What the unmodified model makes of states "b n d"."""
    if is_timm(kind):
        return model.forward_head(states)
    if kind.startswith("openclip"):
        return model._pool(states)[0] @ model.proj
    if kind.startswith("dinov2"):
        return states[:, 0]
    return model.head(states) if kind.startswith("siglip") else model.post_layernorm(states[:, 0])


def prefix(kind: str, model) -> int:
    return model.num_prefix_tokens if is_timm(kind) else int(not kind.startswith("siglip"))


def mixed_in(kind: str, model, layer: int, x, heads):
    """The residual stream behind attention, from what the heads gave "b n d"."""
    if is_timm(kind):
        block = model.blocks[layer]
        scale = block.ls1 if hasattr(block, "ls1") else (lambda y: y if block.gamma_1 is None else block.gamma_1 * y)
        return x + scale(block.attn.proj(block.attn.norm(heads)))
    if kind.startswith("openclip"):
        block = model.transformer.resblocks[layer]
        return x + block.ls_1(block.attn.out_proj(heads))
    if kind.startswith("dinov2"):
        block = model.encoder.layer[layer]
        return x + block.layer_scale1(dinov2_linears(block)[3](heads))
    return x + model.encoder.layers[layer].self_attn.out_proj(heads)


@reference
def left(kept, real, prefix: int) -> torch.Tensor:
    """Where the tokens that are left of one sample stand in the whole sequence."""
    return torch.cat([torch.arange(prefix), kept[real] + prefix])
