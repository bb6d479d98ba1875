"""Run as a script with TRITON_INTERPRET=1: the kernels of Triton on a CPU, beside dense maps in float64.

In float32 and float16: the interpreter has no products of bfloat16.
"""

from __future__ import annotations

from itertools import product

import torch
from core.test_scores import SUMS, case, same

from helpers.reference import dense_map
from ivtp.core.triton_sums import sums_per_head


def compare(n: int, width: int, shared: int, causal: bool, padded: bool, dtype: torch.dtype) -> None:
    attentions, tokens, *_ = case(2, n, 2, shared, width, 1, causal, padded, padded, 1, n)
    q, k, bias = attentions[0].q.to(dtype), attentions[0].k.to(dtype), attentions[0].bias
    w = torch.rand(tokens.size.shape, generator=torch.Generator().manual_seed(2))
    w = w * (w > 0.3)
    low = None if bias is None else bias.clamp_min(-1e3)
    # As layers hand them out: heads are not side by side in memory.
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    sums = sums_per_head(q, k, w, low, attentions[0].scale, causal).sum(1)
    expected = (w.double()[:, None] @ dense_map(q, k, attentions[0].scale, bias, causal))[:, 0]
    same(sums[tokens.valid] / q.shape[1], expected[tokens.valid], SUMS[dtype])


if __name__ == "__main__":
    for shape in product([5, 67, 130], [7, 24], [1, 3], [False, True], [False, True], [torch.float32, torch.float16]):
        compare(*shape)
    print("equal")
