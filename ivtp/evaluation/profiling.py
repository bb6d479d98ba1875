"""Time, memory and FLOPs measured per part of a pruned model, through `ivtp.prune(part=...)`."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_flop_count


def _whole_attention(x, *others, **_) -> int:
    """FLOPs of `nn.MultiheadAttention` as one kernel: projections in and out, and the attention between."""
    (b, n, d), (_, _, _, heads, qkv, _, out, *_) = x, others
    one = b, heads, n, d // heads
    return 2 * b * n * (math.prod(qkv) + math.prod(out)) + sdpa_flop_count(one, one, one)


def _attention(q, k, v, *_, **__) -> int:
    """FLOPs of attention whose query heads may share key and value heads: every query head computes its own."""
    (b, heads, _, width), m = q, k[2]
    return sdpa_flop_count(q, (b, heads, m, width), (b, heads, m, v[-1]))


def _product(a, b, *_, **__) -> int:
    """FLOPs of `bmm`; zero for the outer product of two vectors, which sums nothing.

    transformers 5.17 computes the angles of rotary positions (frequency × position) by one, later versions do not.
    """
    return 0 if a[2] == 1 and min(a[1], b[2]) > 1 else bmm_flop(a, b)


# CPU kernels that torch's counter lacks; `bmm` is in it from 2.15 on.
KERNELS = {
    torch.ops.aten.bmm: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._native_multi_head_attention: _whole_attention,
}
PARTS = ("vision", "projector", "text_encoder", "language", "pruner")


def synchroniser(device: torch.device | str) -> Callable[[], None]:
    """Function that waits for the work queued on a device."""
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None


class Meter:
    """Amounts per part, by a reading that grows; what is spent in a part inside another counts for the inner one only."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.amounts: defaultdict[str, Any] = defaultdict(int)
        self._inside: list[str] = []
        self._since: float = 0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Context of a part."""
        self._switch()
        self._inside.append(part)
        try:
            yield
        finally:
            self._switch()
            self._inside.pop()

    def _switch(self) -> None:
        now = self.read()
        if self._inside:
            self.amounts[self._inside[-1]] += now - self._since
        self._since = now


class Stopwatch(Meter):
    """Seconds per part."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        synchronise = synchroniser(device)
        super().__init__(lambda: synchronise() or time.perf_counter())
        self.seconds: dict[str, float] = self.amounts


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Peak of the bytes that torch allocates during `run()`, beyond those allocated before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        run()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def flop_counter() -> FlopCounterMode:
    """FLOP counter of torch, with formulas for the CPU kernels that it counts as zero."""
    return FlopCounterMode(display=False, custom_mapping=KERNELS)


def count(model, plan, run: Callable[[], object], question: str, rest: str = "language") -> dict[str, int]:
    """FLOPs of `run()`, the prefill of one sample, per part and in total.

    The LM head counts on every position, as in the paper. Operations outside every part (the LM head, a classifier) belong
    to `rest`.
    """
    from ivtp.api import prune

    counter = flop_counter()
    parts = Meter(counter.get_total_flops)
    with torch.inference_mode(), prune(model, plan, instruction=[question], part=parts), counter:
        run()
    total = counter.get_total_flops()
    parts.amounts[rest] += total - sum(parts.amounts.values())
    return {part: parts.amounts.get(part, 0) for part in PARTS} | {"total": total}
