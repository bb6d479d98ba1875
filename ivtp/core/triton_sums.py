"""The weighted column sums of attention maps as two kernels of Triton: the log-sum-exp of every row, then the columns.

`(wᵀA)_j = Σ_i w_i exp(s q_i·k_j + bias_j − lse_i)`. Both kernels form blocks of logits in registers and write O(n) numbers.
Heads that share keys read them where they are; nothing is repeated, padded or copied.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
OWN, OTHER = {True: 64, False: 128}, {True: 32, False: 64}
"""Sizes of a block of logits, in float32 or in narrower numbers: of what a program holds, and of what it goes through."""


@triton.jit
def logits_of(q, k, bias, row, column, n, m, scale, causal: tl.constexpr, biased: tl.constexpr, exact: tl.constexpr):
    """Logits "rows columns" of a block to the base of 2, -inf where a query does not see a key; scale and bias are too."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee" if exact else "tf32") * scale
    if biased:
        logits += tl.load(bias + column, mask=column < m, other=0.0)[None, :]
    seen = (row < n)[:, None] & (column < m)[None, :]
    if causal:
        seen &= column[None, :] <= row[:, None]
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def block_of(x, stride, index, count, width: tl.constexpr, padded: tl.constexpr):
    """Vectors "rows width" of a block, 0 beyond the end and the width."""
    channel = tl.arange(0, padded)
    place = x + index[:, None] * stride + channel[None, :]
    return tl.load(place, mask=(index < count)[:, None] & (channel < width)[None, :], other=0.0)


@triton.jit
def row_kernel(
    q, k, bias, lse, qb, qh, qn, kb, kh, kn, heads, share, n, m, scale,
    width: tl.constexpr, padded: tl.constexpr, causal: tl.constexpr, biased: tl.constexpr, exact: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the logits of a block of rows."""
    which = tl.program_id(1).to(tl.int64)
    sample, head = which // heads, which % heads
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    queries = block_of(q + sample * qb + head * qh, qn, row, n, width, padded)
    keys = k + sample * kb + (head // share) * kh
    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    end = tl.minimum(m, (tl.program_id(0) + 1) * rows) if causal else m
    for start in range(0, end, columns):
        column = start + tl.arange(0, columns)
        block = block_of(keys, kn, column, m, width, padded)
        logits = logits_of(queries, block, bias + sample * m, row, column, n, m, scale, causal, biased, exact)
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        top = higher
    tl.store(lse + which * n + row, top + tl.log2(total), mask=row < n)


@triton.jit
def column_kernel(
    q, k, w, bias, lse, out, qb, qh, qn, kb, kh, kn, heads, share, n, m, scale,
    width: tl.constexpr, padded: tl.constexpr, causal: tl.constexpr, biased: tl.constexpr, exact: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Weighted sums of a block of columns of one head's map."""
    which = tl.program_id(1).to(tl.int64)
    sample, head = which // heads, which % heads
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    block = block_of(k + sample * kb + (head // share) * kh, kn, column, m, width, padded)
    queries = q + sample * qb + head * qh
    sums = tl.zeros([columns], tl.float32)
    first = (tl.program_id(0) * columns) // rows * rows if causal else 0
    for start in range(first, n, rows):
        row = start + tl.arange(0, rows)
        some = block_of(queries, qn, row, n, width, padded)
        logits = logits_of(some, block, bias + sample * m, row, column, n, m, scale, causal, biased, exact)
        base = tl.load(lse + which * n + row, mask=row < n, other=0.0)
        weight = tl.load(w + sample * n + row, mask=row < n, other=0.0)
        sums += tl.sum(tl.exp2(logits - base[:, None]) * weight[:, None], 0)
    tl.store(out + which * m + column, sums, mask=column < m)


def sums_per_head(q: Tensor, k: Tensor, w: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Weighted column sums "b h m" of every head, float32; w "b n" and bias "b m" in float32."""
    b, heads, n, width = q.shape
    groups, m = k.shape[1:3]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    w, bias = w.float().contiguous(), None if bias is None else (bias.float() * LOG2_E).contiguous()
    lse = torch.empty(b, heads, n, device=q.device, dtype=torch.float32)
    out = torch.empty(b, heads, m, device=q.device, dtype=torch.float32)
    where: Any = (*q.stride()[:3], *k.stride()[:3], heads, heads // groups, n, m, scale * LOG2_E)
    exact = q.dtype == torch.float32
    own: Any = OWN[exact]
    other: Any = OTHER[exact]
    settings: dict[str, Any] = {
        "width": width,
        "padded": max(16, triton.next_power_of_2(width)),
        "causal": causal,
        "biased": bias is not None,
        "exact": exact,
        "num_warps": 4 if exact else 8,
    }
    added = w if bias is None else bias
    row_kernel[triton.cdiv(n, own), b * heads](q, k, added, lse, *where, **settings, rows=own, columns=other)
    column_kernel[triton.cdiv(m, own), b * heads](q, k, w, added, lse, out, *where, **settings, rows=other, columns=own)
    return out
