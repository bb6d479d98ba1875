"""Latency of the prefill of one model at one prompt length and batch size, split into parts and compared with FLOPs."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import profile

from ivtp.api import prune
from ivtp.backbones import shape_of
from ivtp.backbones.hooks.attention_interface import CACHE
from ivtp.core.flops import Shape, cost
from ivtp.core.plan import Plan, Stage
from ivtp.evaluation.profiling import Stopwatch, peak_bytes, synchroniser
from ivtp.pruners import load_pruner
from ivtp.timing.measure import Run, interleave, ratio, summary
from ivtp.timing.models import prompts

PARTS = ("vision", "projector", "text_encoder", "language", "score", "pruner")
"""Timed parts. "pruner" is select and reduce alone; embeddings and LM head are in none of them."""

OPERATORS = 12
"""Number of operators in a record."""


@dataclass(frozen=True)
class Case:
    """Prompts of `text` words and one image, `batch` of them, pruned to `keep` visual tokens."""

    model: Any
    batch: int
    text: int
    keep: int

    @property
    def plans(self) -> dict[str, Plan]:
        """Plans by name; "random" has IVTP's schedule and random scores."""
        shape = shape_of(self.model)
        random = {"vision_score": "random", "language_score": "random"}
        return {
            "none": load_pruner("none", shape),
            "ivtp": load_pruner("ivtp", shape, keep=self.keep),
            "random": load_pruner("ivtp", shape, keep=self.keep, **random),
        }

    def runs(self) -> dict[str, Run]:
        """Prefill by the model's own forward, by our loop without a pruner, under IVTP, and with random scores."""
        inputs, questions = prompts(self.model, self.batch, self.text)

        def prefill():
            return self.model(**inputs, logits_to_keep=1, use_cache=True)

        plans = {"unpruned": None} | self.plans
        return {name: Run(prefill, partial(under, self.model, plan, questions)) for name, plan in plans.items()}


def under(model: Any, plan: Plan | None, questions: list[str]) -> AbstractContextManager:
    """Context that prunes a model by a plan, if there is one."""
    return nullcontext() if plan is None else prune(model, plan, instruction=questions)


def measure(case: Case, rounds: int, limits: dict[str, float]) -> dict:
    """Record of a case: times, ratios, parts, FLOPs, roofline, memory, key-value cache."""
    device, shape, plans, runs = case.model.device, shape_of(case.model), case.plans, case.runs()
    both = {name: runs[name] for name in ("unpruned", "ivtp")}
    seconds = interleave(runs, rounds, device)
    flops = {name: executed(shape, plans[name], case) for name in ("none", "ivtp", "random")}
    parts = {name: split(case, name, max(1, rounds // 2)) for name in ("none", "ivtp")}
    promise = sum(flops["none"].values()) / sum(flops["ivtp"].values())
    speedup = ratio(seconds["unpruned"], seconds["ivtp"])
    roofs = {name: roofline(case.model, flops[name], limits) for name in ("none", "ivtp")}
    return {
        "batch": case.batch,
        "text": case.text,
        "tokens": list(cost(shape, plans["ivtp"], case.text).tokens),
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "scoring_overhead": ratio(seconds["ivtp"], seconds["random"]),
        "loop_overhead": ratio(seconds["none"], seconds["unpruned"]),
        "speedup": speedup,
        "speedup_promised": promise,
        "speedup_of_roofline": sum(roofs["none"].values()) / sum(roofs["ivtp"].values()),
        "speedup_over_promise": speedup["median"] / promise,
        "flops": flops,
        "parts": parts,
        "roofline": roofs,
        "rest": rest(parts, flops, median(seconds["ivtp"])),
        "operators": {name: operators(run, device) for name, run in both.items()},
        "product_flops": product_flops(case),
        "peak_bytes": {name: _peak(run, device) for name, run in both.items()},
        "cache_bytes": {name: cache_bytes(case, name) for name in ("none", "ivtp")},
    }


def executed(shape: Shape, plan: Plan, case: Case) -> dict[str, int]:
    """FLOPs of a prefill as it is run, per part: with the LM head on the last position only, without scores."""
    read = len(prompts(case.model, 1, case.text)[1][0].split()) + 2
    spent = cost(shape, plan, case.text, read)
    left = spent.tokens[-1] + case.text + shape.separators
    assert shape.language is not None
    head = 2 * (left - 1) * shape.language.width * shape.vocabulary
    parts = {name: getattr(spent, name) for name in ("vision", "projector", "text_encoder", "language")}
    parts["language"] -= head
    return {name: case.batch * value for name, value in parts.items()}


@torch.inference_mode()
def split(case: Case, name: str, rounds: int) -> dict[str, float]:
    """Seconds per part: medians over separate rounds, in which the parts wait for each other on a GPU."""
    inputs, questions = prompts(case.model, case.batch, case.text)
    seconds = defaultdict(list)
    for _ in range(rounds):
        watch = Stopwatch(case.model.device)
        plan = timed(case.plans[name], watch)
        with prune(case.model, plan, instruction=questions, part=watch), watch("rest"):
            case.model(**inputs, logits_to_keep=1, use_cache=True)
        for part in (*PARTS, "rest"):
            seconds[part].append(watch.seconds.get(part, 0.0))
    return {part: median(values) for part, values in seconds.items()}


@dataclass(frozen=True, eq=False)
class TimedScore:
    """Score whose time counts as part "score"."""

    score: Any
    watch: Stopwatch

    def __getattr__(self, name: str):
        return getattr(self.score, name)

    def __call__(self, *arguments):
        """Score tokens."""
        with self.watch("score"):
            return self.score(*arguments)


def timed(plan: Plan, watch: Stopwatch) -> Plan:
    """Copy of a plan whose scores are timed."""

    def with_clock(stage: Stage | None) -> Stage | None:
        return stage and replace(stage, score=TimedScore(stage.score, watch))

    return replace(plan, vision=with_clock(plan.vision), language=with_clock(plan.language))


def roofline(model: Any, flops: dict[str, int], limits: dict[str, float]) -> dict[str, float]:
    """Seconds per part of the roofline: all FLOPs at the rate of a large product, or reading the weights once."""
    weights = {
        "vision": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language": nn.ModuleList([*model.model.language_model.layers, model.lm_head]),
    }
    sizes = {name: sum(p.nbytes for p in module.parameters()) for name, module in weights.items()}
    return {name: max(f / limits["flops"], sizes.get(name, 0) / limits["bytes"]) for name, f in flops.items()}


def rest(parts: dict[str, dict[str, float]], flops: dict[str, dict[str, int]], whole: float) -> dict[str, float]:
    """Time that FLOPs do not explain, as fractions of the pruned prefill.

    For parts of the model: the time beyond the unpruned one scaled by FLOPs; for parts of pruning: all of it.
    """
    none, pruned = parts["none"], parts["ivtp"]
    lost = {
        part: pruned[part] - none[part] * flops["ivtp"][part] / flops["none"][part]
        for part in ("vision", "projector", "language")
    }
    lost |= {part: pruned[part] for part in ("text_encoder", "score", "pruner")}
    lost["rest"] = pruned["rest"] - none["rest"]
    return {part: seconds / whole for part, seconds in lost.items()}


def operators(run: Run, device: torch.device) -> dict[str, float]:
    """Seconds per operator (on a GPU: of its kernels) without the operators that it calls, the longest first."""
    own = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    with entered(run) as call, profile() as profiler:
        call()
        synchroniser(device)()
    events = [event for event in profiler.key_averages() if event.device_type.name == device.type.upper()]
    seconds = {event.key: getattr(event, own) / 1e6 for event in events}
    return dict(sorted(seconds.items(), key=lambda item: -item[1])[:OPERATORS])


@torch.inference_mode()
def product_flops(case: Case) -> dict[str, float]:
    """FLOPs per second of one projection of the decoder's FFN, by number of rows: in the unpruned prefill, and in the layers
    behind the last cut. All layers take turns, so that no weight is in a cache."""
    shape = shape_of(case.model)
    linears = [layer.mlp.up_proj for layer in case.model.model.language_model.layers]
    left = cost(shape, case.plans["ivtp"], case.text).tokens[-1]
    rates = {}
    for tokens in (shape.tokens, left):
        rows = case.batch * (tokens + case.text + shape.separators)
        x = torch.randn(rows, linears[0].in_features, device=case.model.device, dtype=case.model.dtype)

        def one_after_another(x=x) -> None:
            for linear in linears:
                linear(x)

        seconds = interleave({"all": Run(one_after_another)}, 3, case.model.device)["all"]
        flops = 2 * rows * sum(linear.in_features * linear.out_features for linear in linears)
        rates[str(rows)] = flops / median(seconds)
    return rates


@contextmanager
def entered(run: Run) -> Iterator:
    """Context of a run, without gradients; yields its call."""
    with torch.inference_mode(), run.inside():
        yield run.call


def _peak(run: Run, device) -> int:
    with entered(run) as call:
        return peak_bytes(call, device)


def cache_bytes(case: Case, name: str) -> dict[str, int]:
    """Bytes of the keys and values after a prefill, as found and in closed form."""
    with entered(case.runs()[name]) as call:
        found = kv_bytes(call())
    return {"found": found, "closed": closed_cache_bytes(case, name)}


def closed_cache_bytes(case: Case, name: str) -> int:
    """Bytes of the keys and values after a prefill in closed form."""
    shape, plan = shape_of(case.model), case.plans[name]
    size, stack, average = case.model.dtype.itemsize, shape.language, cost(shape, plan, case.text).average_tokens
    assert stack is not None and average is not None
    tokens = stack.depth * (average + case.text + shape.separators)
    return round(case.batch * 2 * tokens * stack.kv_heads * stack.head_width * size)


def kv_bytes(output) -> int:
    """Bytes of the keys and values in a model's output."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in output[CACHE].layers)
