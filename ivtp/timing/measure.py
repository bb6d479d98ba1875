"""Measure latency: warmed up, in alternating order, with medians and their intervals."""

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from ivtp.backbones.hooks.packed_linear import AVAILABLE, fits, pack
from ivtp.evaluation.hardware import hardware
from ivtp.evaluation.profiling import synchroniser

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Run:
    """Timed call, and the context that it needs, which is entered before the clock starts."""

    call: Callable[[], object]
    inside: Callable[[], AbstractContextManager] = nullcontext


@torch.inference_mode()
def interleave(
    runs: dict[K, Run], rounds: int, device: torch.device | str = "cpu", warmup: int = 1
) -> dict[K, list[float]]:
    """Seconds of every run in every round.

    The order alternates (A B C, C B A, A B C, …), so that changes of the machine's speed affect all runs. The clock starts
    and stops after the work queued on a GPU is done.
    """
    wait = synchroniser(device)
    seconds: dict[K, list[float]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            with runs[name].inside():
                wait()
                start = time.perf_counter()
                runs[name].call()
                wait()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def can_empty_heap() -> bool:
    """True if the C library can return free memory to the system (glibc)."""
    return hasattr(ctypes.CDLL(None), "malloc_trim")


@contextmanager
def empty_heap() -> Iterator[None]:
    """Context that first returns free memory to the system (glibc), so that a run reuses none of an earlier one."""
    ctypes.CDLL(None).malloc_trim(0)
    yield


def summary(values: list[float]) -> dict[str, Any]:
    """Median and its 95 % interval by order statistics; the range for fewer than six values."""
    ordered, n = sorted(values), len(values)
    below = 0  # values that may lie beyond each end: the binomial tail stays below 2.5 %
    while below < (n - 1) // 2 and sum(math.comb(n, k) for k in range(below + 2)) / 2**n < 0.025:
        below += 1
    return {"median": median(ordered), "interval": [ordered[below], ordered[n - 1 - below]], "rounds": n}


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """Median and interval of the rounds' ratios of two alternating runs."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def machine(device: torch.device | str, kernel: str | None = None) -> dict:
    """Description of the machine and the software; `kernel`: attention implementation of what is measured."""
    import transformers

    from ivtp import __version__

    device = torch.device(device)
    found = hardware(device, kernel)
    description = {
        "device": found.pop("name"),
        **found,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ivtp": __version__,
    }
    return description | ({"cuda": torch.version.cuda} if device.type == "cuda" else {})


def limits(device: torch.device | str, dtype: torch.dtype) -> dict[str, float]:
    """Peak FLOPs and bytes per second of the machine, measured by a large product (also packed) and a large copy."""
    n, words = (8192, 1 << 28) if torch.device(device).type == "cuda" else (2048, 1 << 26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x, y = (torch.zeros(words, device=device) for _ in range(2))
    runs = {"product": Run(lambda: a @ b), "copy": Run(lambda: y.copy_(x))}
    if AVAILABLE and fits(b):
        linear = pack(torch.nn.Linear(n, n, bias=False))
        runs["packed"] = Run(lambda: linear(a))
    seconds = interleave(runs, 5, device)
    fastest = min(min(seconds[name]) for name in runs if name != "copy")
    return {"flops": 2 * n**3 / fastest, "bytes": 2 * 4 * words / min(seconds["copy"])}
