"""Shared parts of the checks: a record of a given attention map, bare tokens, stacks that record their hidden states."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ivtp.core.attention import Attention
from ivtp.core.tokens import Tokens


def recorded(attn: Tensor, v: Tensor | None = None) -> Attention:
    """An attention record whose softmax is the given map "b h n m": the keys are unit vectors, the queries log maps."""
    b, h, _, m = attn.shape
    k = torch.eye(m, dtype=attn.dtype).expand(b, h, m, m)
    q, v = attn.clamp_min(1e-38).log(), k if v is None else v
    width = max(m, v.shape[-1])  # all of one width, as in a model; zeros change no product and no norm
    q, k, v = (torch.nn.functional.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    return Attention(q, k, v, 1.0)


def tokens_of(x: Tensor, start: int = 1, count: int | None = None, reference: int = 0) -> Tokens:
    """Tokens with `count` visual ones from place `start` on (default: all the rest), scored by the one at `reference`.

    Positions count from the first visual token, as in every backbone's tower.
    """
    n = x.shape[1]
    count = n - start if count is None else count
    place = torch.arange(n)[None]
    return Tokens.of(
        x,
        visual=(place >= start) & (place < start + count),
        reference=place == (reference % n),
        position=(place - start).expand(x.shape[0], -1),
    )


class Watched:
    """A stack that keeps the hidden states after every layer."""

    def __init__(self, stack) -> None:
        self.stack, self.after = stack, []

    def __getattr__(self, name: str):
        return getattr(self.stack, name)

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        tokens = self.stack.leave(layer, tokens)
        self.after.append(tokens)
        return tokens


def timm_vit(case, distilled: bool = False):
    """The case's whole network as a timm VisionTransformer."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    p, weights = case.params, case.state_dict()
    make = VisionTransformerDistilled if distilled else VisionTransformer
    model = make(
        img_size=tuple(p["img_size"]), patch_size=p["patch"], embed_dim=p["dim"], depth=p["depth"],
        num_heads=p["heads"], mlp_ratio=p["mlp_ratio"], num_classes=weights["head.weight"].shape[0],
        norm_layer=partial(torch.nn.LayerNorm, eps=p["eps_layernorm"]),
    )  # fmt: skip
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def llama(case):
    """The case's decoder as a transformers LlamaModel."""
    from transformers import LlamaConfig, LlamaModel

    p, weights = case.params, case.state_dict()
    config = LlamaConfig(
        hidden_size=p["hidden"], intermediate_size=p["intermediate"], num_hidden_layers=p["depth"],
        num_attention_heads=p["heads"], num_key_value_heads=p.get("kv_heads", p["heads"]), vocab_size=8,
        rms_norm_eps=p["rms_norm_eps"], rope_parameters={"rope_type": "default", "rope_theta": p["rope_theta"]},
    )  # fmt: skip
    model = LlamaModel(config).eval().requires_grad_(False)
    own = model.state_dict()
    weights = {key.removeprefix("model."): value for key, value in weights.items()}
    unknown = set(weights) - set(own) - {key for key in weights if "rotary" in key or "lm_head" in key}
    assert not unknown, f"weights that a LlamaModel does not have: {sorted(unknown)}"
    missing = set(own) - set(weights) - {"embed_tokens.weight"}
    assert not missing, f"weights that the case does not have: {sorted(missing)}"
    model.load_state_dict(
        {key: value for key, value in weights.items() if key in own and key != "embed_tokens.weight"}, strict=False
    )
    return model
