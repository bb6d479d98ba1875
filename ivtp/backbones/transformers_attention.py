"""See q, k, v of a transformers attention module while its own kernel computes the output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from inspect import signature

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

NAME = "ivtp_recording"
CACHE = "cache" if "cache" in signature(LlamaAttention.forward).parameters else "past_key_values"
"""What transformers calls the key-value cache: the first from 5.24 on."""


# Of the calls under way: the kernel that computes, who is told q, k, v, and the masks of a packed sequence's pieces. Not
# passed as arguments: some modules (SigLIP) hand none on.
_asked: ContextVar[list[tuple[str, Callable, Iterator[Tensor] | None]]] = ContextVar("ivtp_asked")


@contextmanager
def asking() -> Iterator[None]:
    """What is compiled has to run in here: torch.compile can read a context variable, but not set it."""
    token = _asked.set([])
    try:
        yield
    finally:
        _asked.reset(token)


def _recording(module, query, key, value, attention_mask, *more, **kwargs):
    name, record, masks = _asked.get()[-1]
    record(query, key, value)
    if masks is not None:
        attention_mask = next(masks)
    # Every modelling file of transformers has its eager attention as a function of this name.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return kernel(module, query, key, value, attention_mask, *more, **kwargs)


AttentionInterface.register(NAME, _recording)


def attend(
    module, hidden_states: Tensor, masks: Iterator[Tensor] | None = None, **kwargs
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Call the attention module as it is; returns its output and the (q, k, v) that its kernel was given, of a packed
    sequence all pieces together; `masks`: of those pieces, for modules that take none."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    output = _call(module, hidden_states, lambda q, k, v: seen.append((q, k, v)), masks, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    return output, seen[0] if len(seen) == 1 else tuple(torch.cat(parts, 2) for parts in zip(*seen, strict=True))


def _call(module, hidden_states: Tensor, record: Callable, masks: Iterator[Tensor] | None = None, **kwargs):
    config = module.config
    kernel = config._attn_implementation
    config._attn_implementation = NAME
    token = None if torch.compiler.is_compiling() else _asked.set([])
    _asked.get().append((kernel, record, masks))
    try:
        return module(hidden_states, **kwargs)
    finally:
        _asked.get().pop()
        if token is not None:
            _asked.reset(token)
        config._attn_implementation = kernel


class _Enough(Exception):
    """Nothing more of a layer has to be computed."""


def peek(module, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """The (q, k, v) that the attention module would give its kernel, which is not called."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(*qkv: Tensor) -> None:
        seen.append(qkv)
        raise _Enough

    with suppress(_Enough):
        _call(module, hidden_states, record, **kwargs)
    return seen[0]


def key_mask(
    kernel: str,
    valid: Tensor,
    queries: int,
    causal: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
    padded: bool | None = None,
) -> Tensor | None:
    """The mask that `kernel` expects, or None where it needs none, so that the fused kernel stays in use.

    valid  "b m" keys that may be seen; the last `queries` of them are the queries' own
    bias   "b m" added to the logits (log size of merged tokens)
    padded False: all keys are valid; None: not known, so it is looked for, for which a GPU makes all wait
    """
    m = valid.shape[1]
    whole = bias is None and queries in (1, m) and not (kernel == "eager" and causal and queries > 1)
    if whole and not (bool(~valid.all()) if padded is None else padded):
        return None
    if kernel.startswith("flash_attention"):
        if bias is not None:
            raise ValueError(
                "attn_implementation='flash_attention_2' takes no attention bias, which proportional attention (tome) "
                "needs; load the model with attn_implementation='sdpa'"
            )
        return valid
    mask = valid[:, None, None, :].expand(-1, 1, queries, -1)
    if causal:
        place = torch.arange(m - queries, m, device=valid.device)
        mask = mask & (torch.arange(m, device=valid.device) <= place[:, None])
    if kernel == "sdpa" and bias is None:
        return mask
    low = torch.finfo(dtype).min
    added = torch.zeros_like(valid, dtype=dtype) if bias is None else bias.to(dtype)
    return added[:, None, None, :].expand_as(mask).masked_fill(~mask, low)
