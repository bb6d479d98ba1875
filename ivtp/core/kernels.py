"""Weighted column sums of attention maps without the maps: a block of the map at a time, or, where a fused kernel hands
out its log-sum-exp, from that of fused attention.

`(wᵀA)_j = Σ_i w_i exp(s q_i·k_j − lse_i)` is the exponential of the log-sum-exp of an attention with queries and keys
exchanged and `log w_i − lse_i` added to the exchanged keys' logits. What is added rides along as one more channel of q
and k, so that no kernel needs a mask; reversing the sequence turns the causal mask round.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

ROWS = 256
"""Query rows formed at a time."""
BLOCK = 1 << 19
"""Entries of the map formed at a time, over heads: what a core's cache holds (2 MiB), whatever n is."""
SCHEMA = "(Tensor q, Tensor k, Tensor w, Tensor? bias, float scale, bool causal) -> Tensor"
PARTS = {torch.float16: 3, torch.bfloat16: 3}
"""Channels that spell a float32 number in a narrower type, each the rounded rest of those before."""
NOTHING = -1e3
"""The logarithm of no weight: exp of it is 0 in float32, and float16 can hold it divided by any usual scale."""


@torch.library.custom_op("ivtp::streamed_sums", mutates_args=(), schema=SCHEMA)
def streamed_sums(
    q: Float[Tensor, "b h n e"],
    k: Float[Tensor, "b g m e"],
    w: Float[Tensor, "b n"],
    bias: Float[Tensor, "b m"] | None,
    scale: float,
    causal: bool,
) -> Float[Tensor, "b m"]:
    """`w @ A` summed over heads, float32, for `A = softmax(q kᵀ scale + bias)`, bias finite; every head's block of rows is
    formed, weighed and forgotten. One operation, so that a compiler does not unroll the blocks."""
    b, h, n, e = q.shape
    g, m = k.shape[1:3]
    q = q.reshape(b * g, h // g, n, e)
    k = k.reshape(b * g, m, e).transpose(1, 2)
    w = w.float()[:, None].expand(b, g, n).reshape(b * g, 1, n)
    if bias is not None:
        bias = bias[:, None].expand(b, g, m).reshape(b * g, 1, m)
    rows = even(n, min(ROWS, BLOCK // m))
    heads = even(b * g, BLOCK // (rows * m))
    place = torch.arange(m, device=w.device)
    # One block of memory for all: the system takes as long to give out a fresh one as the sums take.
    block, sums = torch.empty(heads * rows * m, device=w.device), torch.zeros(b * g, 1, m, device=w.device)
    for some in (slice(start, start + heads) for start in range(0, b * g, heads)):
        keys = k[some].float()
        for part in (slice(start, min(n, start + rows)) for start in range(0, n, rows)):
            size = (len(keys), part.stop - part.start, m)
            logits = block[: size[0] * size[1] * m].view(size)
            for head in range(h // g):
                queries = q[some, head, part].float()
                torch.baddbmm(logits, queries, keys, beta=0, alpha=scale, out=logits)
                if bias is not None:
                    logits += bias[some]
                if causal:
                    logits.masked_fill_(place > place[part, None], float("-inf"))
                sums[some] += w[some, :, part] @ torch.softmax(logits, -1, out=logits)
    return sums.view(b, g, m).sum(1)


def even(whole: int, most: int) -> int:
    """The size of the fewest parts of at most `most`, all but equal: a small one at the end costs as much as a whole one."""
    return math.ceil(whole / math.ceil(whole / max(1, most)))


@torch.library.custom_op("ivtp::column_sums", mutates_args=(), schema=SCHEMA)
def column_sums(
    q: Float[Tensor, "b h n e"],
    k: Float[Tensor, "b g m e"],
    w: Float[Tensor, "b n"],
    bias: Float[Tensor, "b m"] | None,
    scale: float,
    causal: bool,
) -> Float[Tensor, "b m"]:
    """`w @ A` summed over heads, float32, for `A = softmax(q kᵀ scale + bias)`; w ≥ 0, bias finite; O(n) memory."""
    share = q.shape[1] // k.shape[1]
    total = torch.zeros(w.shape[0], k.shape[2], device=q.device)
    for head in range(share):  # the heads that share keys in turn, so that the keys are never repeated
        queries = q[:, head::share]
        rows = log_sum_exp(queries, k, None if bias is None else bias[:, None], scale, causal)
        weight = w.log().clamp_min(NOTHING)[:, None] - rows
        if causal:
            sums = log_sum_exp(k.flip(2), queries.flip(2), weight.flip(2), scale, True).flip(2)
        else:
            sums = log_sum_exp(k, queries, weight, scale, False)
        total += (sums if bias is None else sums + bias[:, None]).exp().sum(1)
    return total


def log_sum_exp(
    q: Float[Tensor, "b h n e"],
    k: Float[Tensor, "b h m e"],
    bias: Float[Tensor, "b _ m"] | None,
    scale: float,
    causal: bool,
) -> Float[Tensor, "b h n"]:
    """`log Σ_j exp(scale q_i·k_j + bias_j)`, float32, as the fused kernel of the device computes it."""
    if bias is not None:
        b, h, n, _ = q.shape
        extra = spelled(bias.expand(b, h, -1) / scale, q.dtype)
        q = torch.cat([q, torch.ones_like(extra[:, :, :1]).expand(b, h, n, -1)], 3)
        k = torch.cat([k, extra], 3)
    if q.is_cuda:
        wider = -q.shape[3] % 8  # the kernel reads 16 bytes at a time
        q, k = pad(q, (0, wider)), pad(k, (0, wider))
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, k[..., :8], None, True, 0.0, causal, scale=scale)[1][:, :, : q.shape[2]]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, causal, scale=scale)[1].float()


def spelled(value: Float[Tensor, "b h m"], dtype: torch.dtype) -> Float[Tensor, "b h m parts"]:
    """float32 numbers as channels of `dtype` that add up to them."""
    parts = []
    for _ in range(PARTS.get(dtype, 1)):
        parts.append(value.to(dtype))
        value = value - parts[-1].to(value.dtype)
    return torch.stack(parts, -1)


def blank(q, k, w, bias, scale, causal):
    """An empty tensor of the sums' shape, for a compiler."""
    return q.new_empty(w.shape[0], k.shape[2], dtype=torch.float32)


def flops(q, k, w, *_, **__) -> int:
    """FLOPs of the sums in either form: every logit once, and the weighing of every probability."""
    b, h, n, e = q
    return 2 * b * h * n * k[2] * (e + 1)


for kernel in (streamed_sums, column_sums):
    kernel.register_fake(blank)
register_flop_formula([torch.ops.ivtp.streamed_sums, torch.ops.ivtp.column_sums])(flops)
