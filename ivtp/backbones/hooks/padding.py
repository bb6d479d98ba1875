"""Keep padding out of attentions, means and pooling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ivtp.core.tokens import Tokens


def log_size(tokens: Tokens, layer: int, proportional: bool) -> Tensor | None:
    """Bias "b n" of proportional attention: log sizes of merged tokens, from the second layer on."""
    return tokens.size.log() if proportional and layer > 0 else None


def score_bias(tokens: Tokens, bias: Tensor | None) -> Tensor | None:
    """Bias "b n" on the logits of every query: log sizes, and -inf on padding; None where it would be zero."""
    if not tokens.facts.padded:
        return bias
    bias = torch.zeros_like(tokens.size) if bias is None else bias
    return bias.masked_fill(~tokens.valid, float("-inf"))


def mean_of_real(values: Tensor, tokens: Tokens) -> Tensor:
    """Mean of `values` "c v f" over the visual tokens that are not padding."""
    real = tokens.of_visual(tokens.valid)[:, :, None].to(values.dtype)
    return (values * real).sum(1) / real.sum(1).clamp_min(1)


def mean_for_padding(x: Tensor, tokens: Tokens, prefix: bool) -> Tensor:
    """Replace padding by the mean of its sample's real patches (`prefix`: and prefix tokens), so that an average over all
    tokens equals the average over the real ones."""
    if not tokens.facts.padded:
        return x
    real = ((tokens.visual | prefix) & tokens.valid)[:, :, None].to(x.dtype)
    mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return torch.where(tokens.valid[:, :, None], x, mean)


@contextmanager
def masked(pooling: nn.Module, **mask: Tensor | None) -> Iterator[None]:
    """Context in which a pooling module gets a mask by its keyword; None: none is needed."""
    arguments = {name: value for name, value in mask.items() if value is not None}
    hook = pooling.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | arguments), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
