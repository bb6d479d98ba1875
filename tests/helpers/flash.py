"""A stand-in for FlashAttention: a kernel of the hub with its functions and its conventions, computed by torch on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

HUB = "kernels-community/flash-attn3"
FILES = {
    "flash_attention_2": "kernels-community/flash-attn2",
    "flash_attention_3": "kernels-community/vllm-flash-attn3",
}
"""What transformers loads where the library of that name is not installed."""


def attention(q, k, v, causal: bool, scale: float):
    """Of one sequence "n h e"; the last query sees the last key, as in FlashAttention from 2.1 on."""
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    n, m = q.shape[1], k.shape[1]
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else None
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


class Flash:
    """Loads like the `kernels` package, under the name that the model asks for, and notes how it is called.

    asked  the repositories that were loaded; calls: "dense", or "packed" with the lengths of the pieces of queries
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.calls: list[tuple[str, list[int]]] = []

    def load(self, repo_id: str, **_):
        self.asked.append(repo_id)
        return SimpleNamespace(flash_attn_func=self.dense, flash_attn_varlen_func=self.packed)

    def dense(self, q, k, v, softmax_scale, causal):
        assert q.ndim == 4 and k.shape == v.shape
        self.calls.append(("dense", []))
        return torch.stack([attention(*row, causal, softmax_scale) for row in zip(q, k, v, strict=True)])

    def packed(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        assert q.ndim == k.ndim == v.ndim == 3
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        pieces = []
        lengths = [bounds.diff().tolist() for bounds in (cu_seqlens_q, cu_seqlens_k)]
        assert (sum(lengths[0]), sum(lengths[1])) == (len(q), len(k))
        assert (max_seqlen_q, max_seqlen_k) == (max(lengths[0]), max(lengths[1]))
        self.calls.append(("packed", lengths[0]))
        for one in zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True):
            pieces.append(attention(*one, causal, softmax_scale))
        return torch.cat(pieces)
