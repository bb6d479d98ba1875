"""Weighted column sums of attention maps out of the log-sum-exp that fused attention kernels compute anyway.

`(wᵀA)_j = Σ_i w_i exp(s q_i·k_j − lse_i)` is the exponential of the log-sum-exp of an attention with queries and keys
exchanged and `log w_i − lse_i` added to the exchanged keys' logits. What is added rides along as one more channel of q
and k, so that no kernel needs a mask; reversing the sequence turns the causal mask round.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from ivtp.pruning.streamed import SCHEMA, blank, flops

PARTS = {torch.float16: 3, torch.bfloat16: 3}
"""Channels that spell a float32 number in a narrower type, each the rounded rest of those before."""
NOTHING = -1e3
"""The logarithm of no weight: exp of it is 0 in float32, and float16 can hold it divided by any usual scale."""


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


column_sums.register_fake(blank)
register_flop_formula(torch.ops.ivtp.column_sums)(flops)
