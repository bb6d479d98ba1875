"""The time of every token of an answer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ivtp.benching.models import prompts
from ivtp.benching.prefill import Case
from ivtp.benching.timing import Run, interleave, ratio, summary
from ivtp.models import prune
from ivtp.pruning.pruner import Plan


class Ticks(StoppingCriteria):
    """When each token of an answer was there; it never stops the answer."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait, self.times = wait, [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        self.wait()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def decoding(case: Case, rounds: int, steps: int, warmup: int = 1) -> dict:
    """Seconds to the first token of an answer, per token behind it (the median of an answer's) and to the last, and the
    ratios that pruning and our loop make of the tokens behind the first."""
    inputs, asked = prompts(case.model, case.batch, case.text)
    wait = torch.cuda.synchronize if case.model.device.type == "cuda" else lambda: None
    ticks = defaultdict(list)

    def answer(name: str):
        def call() -> None:
            clock = Ticks(wait)
            length = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
            case.model.generate(**inputs, **length, stopping_criteria=[clock])
            ticks[name].append(clock.times)

        return call

    def under(plan: Plan | None) -> Callable[[], AbstractContextManager]:
        return (lambda: prune(case.model, plan, instruction=asked)) if plan else torch.inference_mode

    plans = {"unpruned": None} | {name: plan for name, plan in case.plans.items() if name != "random"}
    interleave(
        {name: Run(answer(name), under(plan)) for name, plan in plans.items()}, rounds, case.model.device, warmup
    )
    kept = {name: times[warmup:] for name, times in ticks.items()}
    token = {name: [median(b - a for a, b in pairwise(row[1:])) for row in rows] for name, rows in kept.items()}
    return {
        "steps": steps,
        "first": {name: summary([row[1] - row[0] for row in rows]) for name, rows in kept.items()},
        "answer": {name: summary([row[-1] - row[0] for row in rows]) for name, rows in kept.items()},
        "token": {name: summary(values) for name, values in token.items()},
        "loop_overhead": ratio(token["none"], token["unpruned"]),
        "speedup": ratio(token["unpruned"], token["ivtp"]),
    }
