"""See q, k, v of a transformers attention module while its own kernel computes the output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

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
"""transformers' name of the key-value cache, which changed in 5.24."""

QKV = tuple[Tensor, Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]


def cache_argument(cache: object) -> dict[str, Any]:
    """A key-value cache as keyword argument of transformers' modules and outputs."""
    return {CACHE: cache}


class _Calls(threading.local):
    """Attention calls of this thread that are under way: the recorder of each, and the masks, keys and values that its
    kernel gets instead.

    They are no arguments of the call, since some modules (SigLIP) pass none on.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[Callable[[QKV], None], Iterator[Tensor | None] | None, KeysValues | None]] = []


_calls = _Calls()
_get_interface = ALL_ATTENTION_FUNCTIONS.get_interface


def _recording_interface(attn_implementation: str, default: Callable) -> Callable:
    """The kernel of that name; in a call made by `attend` or `peek`, one that records q, k and v first.

    Every module asks for its kernel here, by the name in its config. A recorder under a name of its own would hide the
    kernel's name, which FlashAttention and some modules read during the call, from all threads and models that share the
    config.
    """
    kernel = _get_interface(attn_implementation, default)
    if not _calls.stack:
        return kernel
    record, masks, keys_values = _calls.stack[-1]

    def recording(module, query, key, value, attention_mask=None, *more, **kwargs):
        key, value = keys_values or (key, value)
        record((query, key, value))
        if masks is not None:
            attention_mask = next(masks)
        return kernel(module, query, key, value, attention_mask, *more, **kwargs)

    return recording


ALL_ATTENTION_FUNCTIONS.get_interface = _recording_interface


def attend(
    module: Any,
    hidden_states: Tensor,
    *,
    masks: Iterator[Tensor | None] | None = None,
    keys_values: KeysValues | None = None,
    **kwargs: Any,
) -> tuple[Tensor, QKV]:
    """Call the attention module as it is; returns its output and the (q, k, v) of its kernel.

    masks  for the kernel's calls in place of the module's own: one per piece of a packed sequence, whose q, k, v are joined
    keys_values  for the kernel in place of the module's own: those of more tokens than `hidden_states` has
    """
    records: list[QKV] = []
    output = _call(module, hidden_states, (records.append, masks, keys_values), **kwargs)
    q, k, v = records[0] if len(records) == 1 else (torch.cat(t, 2) for t in zip(*records, strict=True))
    return output[0] if isinstance(output, tuple) else output, (q, k, v)


def _call(module: Any, hidden_states: Tensor, call: tuple, **kwargs: Any):
    _calls.stack.append(call)
    try:
        return module(hidden_states, **kwargs)
    finally:
        _calls.stack.pop()


class _Enough(Exception):
    """Signal that no more of a layer has to be computed."""


def peek(module: Any, hidden_states: Tensor, **kwargs: Any) -> QKV:
    """The (q, k, v) that the attention module would give its kernel, which is not called."""
    records: list[QKV] = []

    def record(qkv: QKV) -> None:
        records.append(qkv)
        raise _Enough

    with suppress(_Enough):
        _call(module, hidden_states, (record, None, None), **kwargs)
    return records[0]


def mask_form(kernel: str | None) -> Callable | None:
    """The mask function that transformers has for a kernel's name, hub kernels included; None: it has none.

    The function that is registered under a name defines the mask that the kernel expects: a padding mask, a 4-d one of
    bool, or an additive one.
    """
    return ALL_MASK_ATTENTION_FUNCTIONS.get(kernel or "eager")


ADDITIVE = (eager_mask, flex_attention_mask)
"""Mask functions of kernels that add a float mask to the logits, and that are not causal without one."""


def check_kernel(kernel: str | None, biased: bool) -> None:
    """Raise UserError for a kernel that cannot serve a pruned model; `biased`: it has to add a bias to its logits."""
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


def refuse_layer_outputs(arguments: Mapping, config: object = None) -> None:
    """Raise UserError for arguments, or defaults of a config, that request one tensor for all tokens of every layer."""
    for name in ("output_attentions", "output_hidden_states"):
        if arguments.get(name, getattr(config, name, False)):
            raise UserError(f"{name}=True: layers have different lengths under pruning; use the run's trace instead")


def key_mask(
    kernel: str | None,
    valid: Tensor,
    queries: int,
    causal: bool,
    bias: Tensor | None,
    dtype: torch.dtype,
    padded: bool,
) -> Tensor | None:
    """The mask that `kernel` expects, or None where it needs none, so that the fused kernel stays in use.

    valid  "b m" False: a masked key; the last `queries` keys are the queries' own
    bias   "b m" added to the logits (log size of merged tokens)
    padded False: all keys are valid
    Raises UserError for a kernel that cannot be given the mask.
    """
    m, form = valid.shape[1], mask_form(kernel)
    if bias is not None:
        check_kernel(kernel, biased=True)
    if form is flash_attention_mask:  # of padding only; FlashAttention is causal by itself, for any number of queries
        return valid if padded else None
    if form is None and padded:
        raise UserError(
            f"attn_implementation={kernel!r} has no mask function, so that padding cannot be hidden from it; register "
            "one by transformers.AttentionMaskInterface.register, or load the model with attn_implementation='sdpa'"
        )
    if form is None:
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
    mask = valid[:, None, None, :]  # of one query, for all of them
    if causal:
        place = torch.arange(m - queries, m, device=valid.device)
        mask = mask & (torch.arange(m, device=valid.device) <= place[:, None])
    if form is not sdpa_mask or bias is not None:
        added = torch.zeros_like(valid, dtype=dtype) if bias is None else bias.to(dtype)
        mask = added[:, None, None, :].expand_as(mask).masked_fill(~mask, torch.finfo(dtype).min)
    return mask.expand(-1, 1, queries, -1)
