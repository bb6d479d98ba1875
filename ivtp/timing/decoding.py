"""Latency of every token of an answer."""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ivtp.evaluation.profiling import synchroniser
from ivtp.timing.measure import Run, interleave, ratio, summary
from ivtp.timing.models import prompts
from ivtp.timing.prefill import Case, under


class TokenTimes(StoppingCriteria):
    """Clock that notes the time of each token of an answer; never stops the answer."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait, self.times = wait, [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        """Note the time of a token."""
        self.wait()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def decoding(case: Case, rounds: int, steps: int, warmup: int = 1) -> dict:
    """Seconds to the first token of an answer, per later token (median of an answer) and to the last token.

    `speedup` and `loop_overhead` are ratios of the seconds per later token.
    """
    inputs, questions = prompts(case.model, case.batch, case.text)
    wait = synchroniser(case.model.device)
    times = defaultdict(list)

    def answer(name: str):
        def call() -> None:
            clock = TokenTimes(wait)
            length = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
            case.model.generate(**inputs, **length, stopping_criteria=[clock])
            times[name].append(clock.times)

        return call

    plans = {"unpruned": None} | {name: plan for name, plan in case.plans.items() if name != "random"}
    contexts = {name: partial(under, case.model, plan, questions) for name, plan in plans.items()}
    interleave(
        {name: Run(answer(name), context) for name, context in contexts.items()}, rounds, case.model.device, warmup
    )
    timed = {name: rows[warmup:] for name, rows in times.items()}
    token = {name: [median(b - a for a, b in pairwise(row[1:])) for row in rows] for name, rows in timed.items()}
    return {
        "steps": steps,
        "first": {name: summary([row[1] - row[0] for row in rows]) for name, rows in timed.items()},
        "answer": {name: summary([row[-1] - row[0] for row in rows]) for name, rows in timed.items()},
        "token": {name: summary(values) for name, values in token.items()},
        "loop_overhead": ratio(token["none"], token["unpruned"]),
        "speedup": ratio(token["unpruned"], token["ivtp"]),
    }
