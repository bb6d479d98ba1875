"""Prefill of several methods on one model, alternating, and the column sums of attention that many of them read."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ivtp.backbones import shape_of
from ivtp.core.attention import Attention
from ivtp.core.flops import cost
from ivtp.evaluation.profiling import peak_bytes
from ivtp.pruners import load_pruner
from ivtp.timing.measure import Run, interleave, ratio, summary
from ivtp.timing.models import prompts
from ivtp.timing.prefill import entered, kv_bytes, under


def compare_methods(
    model: Any, names: Sequence[str], keeps: Sequence[int], batch: int, text: int, rounds: int, warmup: int = 1
) -> dict:
    """Seconds, speed-up, promised speed-up, peak memory and cache of the prefill, per method and number of kept tokens."""
    shape, (inputs, questions) = shape_of(model), prompts(model, batch, text)
    plans = {"unpruned": None}
    plans |= {f"{name} {keep}": load_pruner(name, shape, keep=keep) for keep in keeps for name in names}
    outputs: list = []

    def prefill() -> None:
        outputs[:] = [model(**inputs, logits_to_keep=1, use_cache=True)]

    runs = {label: Run(prefill, partial(under, model, plan, questions)) for label, plan in plans.items()}
    seconds = interleave(runs, rounds, model.device, warmup)
    whole = cost(shape, load_pruner("none", shape), text)
    found = {}
    for label, run in runs.items():
        outputs.clear()
        with entered(run) as call:
            peak = peak_bytes(call, model.device)
        plan = plans[label]
        found[label] = {
            "seconds": summary(seconds[label]),
            "speedup": ratio(seconds["unpruned"], seconds[label]),
            "promised": whole.total / cost(shape, plan, text).total if plan else 1.0,
            "peak_bytes": peak,
            "cache_bytes": kv_bytes(outputs[0]),
        }
    return {"batch": batch, "text": text, "rows": found}


def compare_sums(device: torch.device | str, dtype: torch.dtype, lengths: Sequence[int], rounds: int) -> list[dict]:
    """Time, memory and error of the weighted column sums of a causal attention of 32 heads, and of the same from its map."""
    rows = []
    for n in lengths:
        g = torch.Generator().manual_seed(n)
        q, k = (torch.randn(1, 32, n, 128, generator=g).to(device, dtype) for _ in range(2))
        w = torch.rand(1, n, generator=g).to(device)
        attention = Attention(q, k, k, 128**-0.5, causal=True)
        calls = {"sums": partial(attention.propagate, w), "dense": partial(dense_sums, attention, w)}
        seconds = interleave({name: Run(call) for name, call in calls.items()}, rounds, device, warmup=2)
        with torch.inference_mode():
            true = exact_sums(attention, w)
            error = {name: float((call()[0] - true).abs().max() / true.max()) for name, call in calls.items()}
            memory = {name: peak_bytes(call, device) for name, call in calls.items()}
        rows.append(
            {
                "n": n,
                "seconds": {name: summary(values) for name, values in seconds.items()},
                "dense_over_sums": ratio(seconds["dense"], seconds["sums"]),
                "peak_bytes": memory,
                "error": error,
            }
        )
    return rows


def dense_sums(attention: Attention, w: Tensor) -> Tensor:
    """Weighted column sums "b m" of a causal attention, mean over heads, from all its maps at once, as eager models do it."""
    q, k = attention.q, attention.k
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ k.transpose(2, 3) * attention.scale).masked_fill_(later, float("-inf"))
    return (w[:, None, None] @ logits.softmax(-1, dtype=w.dtype)).mean(1)[:, 0]


def exact_sums(attention: Attention, w: Tensor) -> Tensor:
    """The same of one sample "m" in float64, a head at a time."""
    w, sums = w.double(), torch.zeros(w.shape[1], dtype=torch.float64, device=w.device)
    for head in range(attention.q.shape[1]):
        q, k = (part[:, head : head + 1].double() for part in (attention.q, attention.k))
        sums += dense_sums(replace(attention, q=q, k=k, v=k), w)[0]
    return sums / attention.q.shape[1]
