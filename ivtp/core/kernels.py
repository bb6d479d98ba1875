"""Weighted column sums of attention maps without the maps: a block of the map at a time."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

ROWS = 256
"""Query rows formed at a time."""
BLOCK = 1 << 19
"""Entries of the map formed at a time, over heads: what a core's cache holds (2 MiB), whatever n is."""
SCHEMA = "(Tensor q, Tensor k, Tensor w, Tensor? bias, float scale, bool causal) -> Tensor"
TRITON = find_spec("triton") is not None
"""True if Triton is there, which torch brings for GPUs on Linux."""


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
    """The same on a GPU by two kernels of Triton (`ivtp.core.triton_sums`); O(n) memory."""
    from ivtp.core.triton_sums import sums_per_head

    return sums_per_head(q, k, w, bias, scale, causal).sum(1)


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
