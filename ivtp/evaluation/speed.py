"""Where time and FLOPs go: measured per part of a pruned model, through `ivtp.prune(part=...)`."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_flop_count


def _whole_attention(x, _, __, ___, heads, qkv, ____, out, *_____, **______) -> int:
    """`nn.MultiheadAttention` as one kernel: projections in and out, and the attention between."""
    b, n, d = x
    one = b, heads, n, d // heads
    return 2 * b * n * (math.prod(qkv) + math.prod(out)) + sdpa_flop_count(one, one, one)


def _attention(q, k, v, *_, **__) -> int:
    """Attention of query heads that may share key and value heads: every query head computes its own."""
    (b, heads, _, width), m = q, k[2]
    return sdpa_flop_count(q, (b, heads, m, width), (b, heads, m, v[-1]))


def _product(a, b, *_, **__) -> int:
    """`bmm`, but for the outer product of two vectors, in which nothing is summed: transformers 5.17 makes the angles of rotary
    positions (frequency × position) by one, and later ones without; no matrix of the model has a part in it."""
    return 0 if a[2] == 1 and min(a[1], b[2]) > 1 else bmm_flop(a, b)


# Kernels for CPUs that torch's counter does not know; the first one it does from 2.15 on.
KERNELS = {
    torch.ops.aten.bmm: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._native_multi_head_attention: _whole_attention,
}
PARTS = ("vision", "projector", "text_encoder", "language", "pruner")


class Stopwatch:
    """Seconds per part, each moment counted once: what a part does inside another is the inner one's.

    synchronise  waits for the device; where work is queued, a clock alone measures nothing
    """

    def __init__(self, synchronise: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronise, self._clock = synchronise, clock
        self._inside: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._switch()
        self._inside.append(part)
        try:
            yield
        finally:
            self._switch()
            self._inside.pop()

    def _switch(self) -> None:
        self._synchronise()
        now = self._clock()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that torch holds for `run()` at most at one time, beyond what it held before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def flop_counter() -> FlopCounterMode:
    """torch's counter, with formulas for the CPU's kernels that it would count as nothing."""
    return FlopCounterMode(display=False, custom_mapping=KERNELS)


class FlopParts:
    """FLOPs per part as torch's own counter sees the executed operations, counted once like the seconds above."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = defaultdict(int)
        self._inside: list[str] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        counter = flop_counter()
        self._inside.append(part)
        try:
            with counter:
                yield
        finally:
            self._inside.pop()
            found = counter.get_total_flops()
            self.flops[part] += found
            if self._inside:  # the outer counter sees them too
                self.flops[self._inside[-1]] -= found


def count(model, plan, run: Callable[[], object], question: str, rest: str = "language") -> dict[str, int]:
    """FLOPs of `run()`, the prefill of one sample, per part and in total, LM head on every position as in the paper's
    count. What is outside every part (the LM head, a classifier) belongs to `rest`.
    """
    from ivtp.models import prune

    parts = FlopParts()
    whole = flop_counter()
    with torch.inference_mode(), prune(model, plan, instruction=[question], part=parts), whole:
        run()
    total = whole.get_total_flops()
    parts.flops[rest] += total - sum(parts.flops.values())
    return {part: parts.flops.get(part, 0) for part in PARTS} | {"total": total}
