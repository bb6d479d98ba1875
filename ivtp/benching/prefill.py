"""One model, one prompt length, one batch: what pruning saves on the clock, and where the rest of the promise went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import profile

from ivtp.backbones.transformers_attention import CACHE
from ivtp.benching.models import prompts
from ivtp.benching.timing import Run, interleave, ratio, summary
from ivtp.evaluation.speed import Stopwatch, peak_bytes
from ivtp.models import prune, shape_of
from ivtp.pruners import load_pruner
from ivtp.pruning.cost import Shape, cost
from ivtp.pruning.pruner import Plan, Pruner

PARTS = ("vision", "projector", "text_encoder", "language", "score", "pruner")
"""Of these "pruner" is selecting and reducing alone; what is in none is the model's own: embeddings, LM head."""

OPERATORS = 12
"""How many operators a record names."""


@dataclass(frozen=True)
class Case:
    """`text` words and one image per prompt, `batch` of them, pruned to `keep` visual tokens."""

    model: nn.Module
    batch: int
    text: int
    keep: int

    @property
    def plans(self) -> dict[str, Plan]:
        shape = shape_of(self.model)
        chance = {"vision_score": "random", "language_score": "random"}
        return {
            "none": load_pruner("none", shape),
            "ivtp": load_pruner("ivtp", shape, keep=self.keep),
            "random": load_pruner("ivtp", shape, keep=self.keep, **chance),
        }

    def runs(self) -> dict[str, Run]:
        """The prefill: the model's own forward, our loop without a pruner, IVTP, and chance on IVTP's schedule."""
        inputs, asked = prompts(self.model, self.batch, self.text)

        def prefill():
            return self.model(**inputs, logits_to_keep=1, use_cache=True)

        def under(plan: Plan):
            return lambda: prune(self.model, plan, instruction=asked)

        return {"unpruned": Run(prefill)} | {name: Run(prefill, under(plan)) for name, plan in self.plans.items()}


def measure(case: Case, rounds: int, limits: dict[str, float]) -> dict:
    """The record of a case: times, ratios, parts, FLOPs, roofline, memory, key-value cache."""
    device, shape, plans = case.model.device, shape_of(case.model), case.plans
    seconds = interleave(case.runs(), rounds, device)
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
        "operators": {
            name: operators(run, device) for name, run in case.runs().items() if name in ("unpruned", "ivtp")
        },
        "product_flops": product_flops(case),
        "peak_bytes": {name: _peak(run, device) for name, run in case.runs().items() if name in ("unpruned", "ivtp")},
        "cache_bytes": {name: cache_bytes(case, name) for name in ("none", "ivtp")},
    }


def executed(shape: Shape, plan: Plan, case: Case) -> dict[str, int]:
    """FLOPs of a prefill as it is run, per part: the LM head on the last position only, scores left out, as promised on
    paper."""
    read = len(prompts_asked(case).split()) + 2
    spent = cost(shape, plan, case.text, read)
    left = spent.tokens[-1] + case.text + shape.separators
    head = 2 * (left - 1) * shape.language.width * shape.vocabulary
    parts = {name: getattr(spent, name) for name in ("vision", "projector", "text_encoder", "language")}
    parts["language"] -= head
    return {name: case.batch * value for name, value in parts.items()}


def prompts_asked(case: Case) -> str:
    return prompts(case.model, 1, case.text)[1][0]


@torch.inference_mode()
def split(case: Case, name: str, rounds: int) -> dict[str, float]:
    """Seconds per part: the median over rounds of their own, since on a GPU the parts wait for each other here."""
    inputs, asked = prompts(case.model, case.batch, case.text)
    wait = torch.cuda.synchronize if case.model.device.type == "cuda" else lambda: None
    found = defaultdict(list)
    for _ in range(rounds):
        watch = Stopwatch(wait)
        plan = watched(case.plans[name], watch)
        with prune(case.model, plan, instruction=asked, part=watch), watch("rest"):
            case.model(**inputs, logits_to_keep=1, use_cache=True)
        for part in (*PARTS, "rest"):
            found[part].append(watch.seconds.get(part, 0.0))
    return {part: median(values) for part, values in found.items()}


class Watched:
    """A score that is timed."""

    def __init__(self, score, watch) -> None:
        self.score, self.watch = score, watch

    def __getattr__(self, name: str):
        return getattr(self.score, name)

    def __call__(self, *given):
        with self.watch("score"):
            return self.score(*given)


def watched(plan: Plan, watch) -> Plan:
    def of(pruner: Pruner | None) -> Pruner | None:
        return pruner and replace(pruner, score=Watched(pruner.score, watch))

    return replace(plan, vision=of(plan.vision), language=of(plan.language))


def roofline(model: nn.Module, flops: dict[str, int], limits: dict[str, float]) -> dict[str, float]:
    """Seconds per part on a machine without losses: all FLOPs at the speed of a large product, or the weights read once."""
    weights = {
        "vision": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language": nn.ModuleList([*model.model.language_model.layers, model.lm_head]),
    }
    held = {name: sum(p.nbytes for p in module.parameters()) for name, module in weights.items()}
    return {name: max(f / limits["flops"], held.get(name, 0) / limits["bytes"]) for name, f in flops.items()}


def rest(parts: dict[str, dict[str, float]], flops: dict[str, dict[str, int]], whole: float) -> dict[str, float]:
    """Where the seconds went that the FLOPs do not account for, as shares of the pruned prefill: what each part takes
    beyond its unpruned time scaled by its FLOPs, and all of what only pruning does."""
    none, pruned = parts["none"], parts["ivtp"]
    lost = {
        part: pruned[part] - none[part] * flops["ivtp"][part] / flops["none"][part]
        for part in ("vision", "projector", "language")
    }
    lost |= {part: pruned[part] for part in ("text_encoder", "score", "pruner")} | {
        "rest": pruned["rest"] - none["rest"]
    }
    return {part: seconds / whole for part, seconds in lost.items()}


def operators(run: Run, device: torch.device) -> dict[str, float]:
    """Seconds per operator (on a GPU: of its kernels), the longest first, without those that it calls."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    own = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    with entered(run) as call, profile() as seen:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    found = {event.key: getattr(event, own) / 1e6 for event in seen.key_averages() if event.device_type == kind}
    return dict(sorted(found.items(), key=lambda item: -item[1])[:OPERATORS])


@torch.inference_mode()
def product_flops(case: Case) -> dict[str, float]:
    """FLOPs per second of one projection of the decoder's FFN, as it runs on so many rows: those of the unpruned prefill,
    and those of the layers behind the last cut. All layers take their turn, so that no weight is in a cache."""
    shape = shape_of(case.model)
    linears = [layer.mlp.up_proj for layer in case.model.model.language_model.layers]
    left = cost(shape, case.plans["ivtp"], case.text).tokens[-1]
    found = {}
    for tokens in (shape.tokens, left):
        rows = case.batch * (tokens + case.text + shape.separators)
        x = torch.randn(rows, linears[0].in_features, device=case.model.device, dtype=case.model.dtype)

        def one_after_another(x=x) -> None:
            for linear in linears:
                linear(x)

        seconds = interleave({"all": Run(one_after_another)}, 3, case.model.device)["all"]
        flops = 2 * rows * sum(linear.in_features * linear.out_features for linear in linears)
        found[str(rows)] = flops / median(seconds)
    return found


@contextmanager
def entered(run: Run) -> Iterator:
    with torch.inference_mode(), run.inside():
        yield run.call


def _peak(run: Run, device) -> int:
    with entered(run) as call:
        return peak_bytes(call, device)


def cache_bytes(case: Case, name: str) -> dict[str, int]:
    """Keys and values that a prefill leaves behind, as found and in closed form."""
    with entered(case.runs()[name]) as call:
        found = held(call())
    shape, plan = shape_of(case.model), case.plans[name]
    size, stack = case.model.dtype.itemsize, shape.language
    tokens = stack.depth * (cost(shape, plan, case.text).average_tokens + case.text + shape.separators)
    closed = case.batch * 2 * tokens * stack.kv_heads * stack.head_width * size
    return {"found": found, "closed": round(closed)}


def held(output) -> int:
    """Bytes of the keys and values that a model's output brings along."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in output[CACHE].layers)
