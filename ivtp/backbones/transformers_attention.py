"""See q, k, v of a transformers attention module while its own kernel computes the output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from inspect import signature

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from ivtp.registry import UserError

CACHE = "cache" if "cache" in signature(LlamaAttention.forward).parameters else "past_key_values"
"""What transformers calls the key-value cache: the first from 5.24 on."""


class _Calls(threading.local):
    """The attention calls of this thread that are under way: who is told q, k, v, and the masks of a packed sequence's
    pieces. Not passed as arguments: some modules (SigLIP) hand none on."""

    def __init__(self) -> None:
        self.stack: list[tuple[Callable, Iterator[Tensor] | None]] = []


_calls = _Calls()
_get_interface = ALL_ATTENTION_FUNCTIONS.get_interface


def _recording_interface(attn_implementation: str, default: Callable) -> Callable:
    """The kernel of that name; in a call made by `attend` or `peek`, one that tells q, k and v first.

    Every module asks for its kernel here, by the name in its config. A recorder under a name of its own would hide the
    kernel's name, which FlashAttention and some modules read during the call, from all threads and models that share the
    config.
    """
    kernel = _get_interface(attn_implementation, default)
    if not _calls.stack:
        return kernel
    record, masks = _calls.stack[-1]

    def recording(module, query, key, value, attention_mask=None, *more, **kwargs):
        record(query, key, value)
        if masks is not None:
            attention_mask = next(masks)
        return kernel(module, query, key, value, attention_mask, *more, **kwargs)

    return recording


ALL_ATTENTION_FUNCTIONS.get_interface = _recording_interface


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
    _calls.stack.append((record, masks))
    try:
        return module(hidden_states, **kwargs)
    finally:
        _calls.stack.pop()


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


def mask_form(kernel: str | None) -> Callable | None:
    """The mask function that transformers has for a kernel's name, hub kernels included; None: it has none.

    What is registered under a name says what the kernel expects: a padding mask, a 4-d one of bool, or an additive one.
    """
    return ALL_MASK_ATTENTION_FUNCTIONS.get(kernel or "eager")


ADDITIVE = (eager_mask, flex_attention_mask)
"""Of kernels that add a float mask to the logits, and that are not causal without one."""


def check_kernel(kernel: str | None, biased: bool) -> None:
    """Raises UserError for a kernel that cannot serve a pruned model; `biased`: if it has to add a bias to its logits."""
    if kernel is not None and kernel.startswith("paged|"):
        raise UserError(
            f"attn_implementation={kernel!r} reads a paged cache, which only continuous batching has; load the model with "
            f"attn_implementation={kernel.removeprefix('paged|')!r}"
        )
    if biased and kernel != "sdpa" and mask_form(kernel) not in ADDITIVE:
        raise UserError(
            f"attn_implementation={kernel!r} takes no attention bias, which proportional attention (tome) needs; load the "
            "model with attn_implementation='sdpa', or set proportional=False"
        )


def key_mask(
    kernel: str | None,
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
    Raises UserError for a kernel that cannot be told.
    """
    m, form = valid.shape[1], mask_form(kernel)
    if bias is not None:
        check_kernel(kernel, biased=True)
    if padded is None:
        padded = bool(~valid.all())
    if form is flash_attention_mask:  # of padding only; FlashAttention is causal by itself, for any number of queries
        return valid if padded else None
    if form is None:
        if padded:
            raise UserError(
                f"attn_implementation={kernel!r} has no mask function, so that padding cannot be hidden from it; register "
                "one by transformers.AttentionMaskInterface.register, or load the model with attn_implementation='sdpa'"
            )
        return None
    if form is not sdpa_mask and form not in ADDITIVE:
        return form(
            batch_size=len(valid),
            q_length=queries,
            kv_length=m,
            q_offset=m - queries,
            kv_offset=0,
            mask_function=causal_mask_function if causal else bidirectional_mask_function,
            attention_mask=valid,
            allow_is_causal_skip=causal,
            allow_is_bidirectional_skip=not causal,
            dtype=dtype,
            device=valid.device,
        )
    whole = queries in (1, m) and not (form in ADDITIVE and causal and queries > 1)
    if whole and bias is None and not padded:
        return None
    mask = valid[:, None, None, :].expand(-1, 1, queries, -1)
    if causal:
        place = torch.arange(m - queries, m, device=valid.device)
        mask = mask & (torch.arange(m, device=valid.device) <= place[:, None])
    if form is sdpa_mask and bias is None:
        return mask
    low = torch.finfo(dtype).min
    added = torch.zeros_like(valid, dtype=dtype) if bias is None else bias.to(dtype)
    return added[:, None, None, :].expand_as(mask).masked_fill(~mask, low)
