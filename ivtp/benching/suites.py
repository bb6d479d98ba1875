"""What a suite runs, and the figures that it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ivtp.benching import models
from ivtp.benching.decoding import decoding
from ivtp.benching.models import Size, build
from ivtp.benching.peers import beside, rollout_over_dense, without_kvpress
from ivtp.benching.prefill import Case, measure
from ivtp.benching.throughput import throughput
from ivtp.benching.timing import Run, interleave, limits, machine, ratio, summary
from ivtp.models import shape_of
from ivtp.registry import UserError

IMPORT = "import ivtp\nfor name in ivtp.__all__: getattr(ivtp, name)"
MAIN_JOB = ("experiment=ablation_groupsize", "logger=none")


@dataclass(frozen=True)
class Cases:
    """Prompts of `texts` words in batches of `batches`, on a model of this size, its weights packed or not, pruned to `keep`
    visual tokens."""

    size: Size
    keep: int
    texts: tuple[int, ...] = (64,)
    batches: tuple[int, ...] = (1,)
    packed: bool = False


@dataclass(frozen=True)
class Suite:
    """The last of all cases is the one whose ratios are the suite's.

    batches   throughput of so many prompts at once, of the longest text of these cases
    steps     generated tokens; like what others do, on the first of the last cases of every size
    main_job  also time the embedded main job
    """

    cases: tuple[Cases, ...]
    batches: Cases
    rounds: int
    steps: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    main_job: bool = False


SUITES = {
    "cpu": Suite(
        (Cases(models.CPU, 64), Cases(models.CPU, 64, packed=True)),
        Cases(models.BASE, 21, batches=(1, 8, 32), packed=True),
        rounds=3,
        steps=8,
        main_job=True,
    ),
    "gpu": Suite(
        (
            Cases(models.LLAVA_7B, 64, texts=(64, 512), batches=(1, 8)),
            Cases(models.LLAVA_NEXT_7B, 320, texts=(64,), batches=(1, 8)),
        ),
        Cases(models.LLAVA_7B, 64, batches=(1, 8, 32)),
        rounds=11,
        steps=64,
        device="cuda",
        dtype=torch.bfloat16,
    ),
    "tiny": Suite(
        (
            Cases(models.SMALL, 9, texts=(11,)),
            Cases(models.SMALL, 9, texts=(11,), packed=True),
            Cases(models.SMALL_CROPS, 45, texts=(11, 31), batches=(2,)),
        ),
        Cases(models.SMALL, 9, texts=(31,), batches=(1, 3)),
        rounds=3,
        steps=3,
    ),
}


def with_model(suite: Suite, name: str) -> Suite:
    """The suite's last cases and its batches on the model of `configs/model/NAME.yaml`, a ninth of whose tokens stays."""
    size = models.of_model(name)
    own = {"size": size, "keep": shape_of(size.config()).tokens // 9}
    return replace(
        suite, cases=(replace(suite.cases[-1], **own),), batches=replace(suite.batches, **own), main_job=False
    )


def run(
    name: str, rounds: int | None = None, model: str | None = None, say: Callable[[str], None] = lambda line: None
) -> dict:
    """The suite's record, on the sizes of `model` in place of its own; `say` hears what is being measured."""
    suite = with_model(SUITES[name], model) if model else SUITES[name]
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"suite={name} needs a CUDA device, and torch {torch.__version__} finds none; use suite=cpu")
    rounds = rounds or suite.rounds
    # What is no ratio of the suite's gets fewer rounds; on a CPU nothing but the first prefill has to be warmed up.
    few, warmup = max(1, rounds // 2), int(suite.device == "cuda")
    about = machine(suite.device) | {"dtype": str(suite.dtype).removeprefix("torch."), "kernel": "sdpa"}
    say("what the machine can do")
    best = limits(suite.device, suite.dtype)
    cases, decoded, peers = [], [], []
    last = {group.size.name: group for group in suite.cases}
    for group in suite.cases:
        say(f"{group.size.name}: random weights{', packed' * group.packed}")
        built = build(group.size, suite.device, suite.dtype, pack=group.packed)
        about_model = {"model": group.size.name, "packed": group.packed}
        first = Case(built, group.batches[0], group.texts[0], group.keep)
        for case in (Case(built, batch, text, group.keep) for text in group.texts for batch in group.batches):
            say(f"{group.size.name}: prefill, batch {case.batch}, {case.text} text tokens")
            cases.append(about_model | measure(case, rounds, best))
        if group is last[group.size.name]:
            missing = without_kvpress()
            say(f"{group.size.name}: what others do{f' ({missing})' if missing else ''}")
            peers.append(about_model | beside(first, few, warmup))
            say(f"{group.size.name}: {suite.steps} generated tokens")
            decoded.append(about_model | decoding(first, few, suite.steps, warmup))
        del built, first, case
    say(f"{suite.batches.size.name}: batches")
    many = suite.batches
    built = build(many.size, suite.device, suite.dtype, pack=many.packed)
    batched = {"model": many.size.name, "packed": many.packed} | throughput(
        built, many.keep, max(many.texts), many.batches, max(1, rounds // 5), warmup
    )
    del built
    say("a group's rollout")
    rollout = rollout_over_dense(suite.device, suite.dtype, rounds)
    say("imports")
    imports = import_times(rounds)
    record = {
        "suite": name,
        "scoring_overhead": cases[-1]["scoring_overhead"]["median"],
        "speedup_over_promise": cases[-1]["speedup_over_promise"],
        "rollout_over_dense": {"time": rollout["time"]["median"], "memory": rollout["memory"]},
        "loop_overhead": cases[-1]["loop_overhead"]["median"],
        "import_seconds": imports["ivtp"]["median"],
        "machine": about,
        "limits": best,
        "cases": cases,
        "decoding": decoded,
        "peers": peers,
        "throughput": batched,
        "rollout": rollout,
        "imports": imports,
    }
    if suite.main_job:
        say(f"ivtp.run {' '.join(MAIN_JOB)}")
        record["main_job_seconds"] = main_job()
    return record


def import_times(rounds: int) -> dict:
    """Seconds to import torch in a fresh process, and how much longer torch and all public names of ivtp take."""

    def python(code: str) -> Run:
        return Run(lambda: subprocess.run([sys.executable, "-c", code], check=True))

    runs = {"torch": python("import torch"), "both": python(f"import torch\n{IMPORT}")}
    seconds = interleave(runs, rounds)
    more = [both - torch for both, torch in zip(seconds["both"], seconds["torch"], strict=True)]
    return {"torch": summary(seconds["torch"]), "ivtp": summary(more), "over": ratio(seconds["both"], seconds["torch"])}


def main_job() -> float:
    """Seconds of the main job, start to end, in a process of its own and an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "ivtp.run", *MAIN_JOB, f"output={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"WANDB_MODE": "offline"})
        return time.perf_counter() - start
