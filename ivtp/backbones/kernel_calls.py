"""See q, k, v of any module whose attention is torch's fused kernel, while that kernel computes the output."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

QKV = tuple[Tensor, Tensor, Tensor]


class _Enough(Exception):
    """Nothing more of a layer has to be computed."""


class _Watch(TorchFunctionMode):
    """Notes what `scaled_dot_product_attention` is given; `only`: what is behind it does not run."""

    def __init__(self, only: bool) -> None:
        super().__init__()
        self.only, self.seen = only, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            self.seen = args[:3]
            if self.only:
                raise _Enough
        return function(*args, **(kwargs or {}))


def call(module: nn.Module, x: Tensor, **kwargs) -> tuple[Tensor, QKV]:
    """What the attention module gives, and the (q, k, v), each "b h n e", that its kernel was given."""
    with _Watch(only=False) as watch:
        output = module(x, **kwargs)
    return output, watch.seen


def peek(module: nn.Module, x: Tensor, **kwargs) -> QKV:
    """The (q, k, v) that the attention module would give its kernel, which is not called."""
    with suppress(_Enough), _Watch(only=True) as watch:
        module(x, **kwargs)
    return watch.seen
