"""Timing suites, and the records of their runs."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ivtp.backbones import shape_of
from ivtp.registry import UserError
from ivtp.timing import models
from ivtp.timing.decoding import decoding
from ivtp.timing.measure import Run, interleave, limits, machine, ratio, summary
from ivtp.timing.methods import compare_methods, compare_sums
from ivtp.timing.models import Size, build
from ivtp.timing.peers import compare_peers, missing_kvpress, rollout_over_dense
from ivtp.timing.pipeline import Load, end_to_end, pipeline
from ivtp.timing.prefill import Case, measure
from ivtp.timing.throughput import throughput

IMPORT = "import ivtp\nfor name in ivtp.__all__: getattr(ivtp, name)"
PIPELINE = "pipeline"
MAIN_JOB = ("experiment=ablation_groupsize", "logger=none")


@dataclass(frozen=True)
class Cases:
    """Prompts of `texts` words in batches of `batches`, on a model of one size, packed or not, pruned to `keep` visual tokens."""

    size: Size
    keep: int
    texts: tuple[int, ...] = (64,)
    batches: tuple[int, ...] = (1,)
    packed: bool = False


@dataclass(frozen=True)
class Suite:
    """Suite of timings; its ratios are those of the last case.

    batches   cases of the throughput, at their longest text
    steps     generated tokens; decoding and peers run on the first of the last cases of every size
    methods   methods whose prefill is compared, each at a ninth and a third of the tokens, at every batch size
    sums      lengths at which the column sums of attention are compared with those of its map
    load      images that go through the loop of a run, from JPEG files to answers
    main_job  also time the embedded main job
    """

    cases: tuple[Cases, ...]
    batches: Cases
    rounds: int
    steps: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    methods: tuple[str, ...] = ()
    sums: tuple[int, ...] = ()
    load: Load | None = None
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
            Cases(models.LLAVA_7B, 64, batches=(1, 8)),
            Cases(models.LLAVA_NEXT_7B, 320, batches=(1, 8)),
        ),
        Cases(models.LLAVA_7B, 64, batches=(1, 8)),
        rounds=7,
        steps=32,
        device="cuda",
        dtype=torch.bfloat16,
        methods=("ivtp", "fastv", "visionzip", "tome", "divprune"),
        sums=(577, 2880, 8192),
        load=Load(images=160, batch=8, workers=(0, 8)),
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
        methods=("fastv", "tome"),
        sums=(33,),
        load=Load(images=3, batch=2, workers=(0,)),
    ),
}


def with_model(suite: Suite, name: str) -> Suite:
    """Copy of a suite with its last cases and its batches on `configs/model/NAME.yaml`, pruned to a ninth of the tokens."""
    size = models.of_model(name)
    own = {"size": size, "keep": shape_of(size.config()).tokens // 9}
    return replace(
        suite, cases=(replace(suite.cases[-1], **own),), batches=replace(suite.batches, **own), main_job=False
    )


def run(
    name: str,
    rounds: int | None = None,
    model: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    save: Callable[[dict], None] = lambda record: None,
) -> dict:
    """Run a suite, on the sizes of `model` if given, and return its record.

    say   called with each step
    save  called with the lists of the record whenever one of them has grown
    """
    if name == PIPELINE:
        return run_pipeline(rounds or 3, model, say)
    suite = with_model(SUITES[name], model) if model else SUITES[name]
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"suite={name} needs a CUDA device, and torch {torch.__version__} finds none; use suite=cpu")
    rounds = rounds or suite.rounds
    # Measurements other than the suite's ratios get fewer rounds; on a CPU only the first prefill needs a warm-up.
    few, warmup = max(1, rounds // 2), int(suite.device == "cuda")
    system = machine(suite.device, "sdpa") | {"dtype": str(suite.dtype).removeprefix("torch.")}
    say("peak rates of the machine")
    best = limits(suite.device, suite.dtype)
    cases, decoded, peers, methods, loops = [], [], [], [], []
    lists = {"cases": cases, "methods": methods, "decoding": decoded, "peers": peers, "end_to_end": loops}
    last = {group.size.name: group for group in suite.cases}
    for group in suite.cases:
        say(f"{group.size.name}: random weights{', packed' * group.packed}")
        network = build(group.size, suite.device, suite.dtype, pack=group.packed)
        about_model = {"model": group.size.name, "packed": group.packed}
        first = Case(network, group.batches[0], group.texts[0], group.keep)
        for case in (Case(network, batch, text, group.keep) for text in group.texts for batch in group.batches):
            say(f"{group.size.name}: prefill, batch {case.batch}, {case.text} text tokens")
            cases.append(about_model | measure(case, rounds, best))
            save(lists)
        if group is last[group.size.name]:
            missing = missing_kvpress()
            say(f"{group.size.name}: peers{f' ({missing})' if missing else ''}")
            peers.append(about_model | compare_peers(first, few, warmup))
            say(f"{group.size.name}: {suite.steps} generated tokens")
            decoded.append(about_model | decoding(first, few, suite.steps, warmup))
            save(lists)
            for batch in group.batches if suite.methods else ():
                say(f"{group.size.name}: methods, batch {batch}")
                keeps = [shape_of(network).tokens // part for part in (9, 3)]
                compared = compare_methods(network, suite.methods, keeps, batch, group.texts[0], few, warmup)
                methods.append(about_model | compared)
                save(lists)
            if suite.load and not group.packed:
                say(f"{group.size.name}: from JPEG files to answers")
                loops.append(about_model | end_to_end(network, group.size, group.keep, suite.load, 1))
                save(lists)
        del network, first, case
    say(f"{suite.batches.size.name}: batches")
    many = suite.batches
    network = build(many.size, suite.device, suite.dtype, pack=many.packed)
    batched = {"model": many.size.name, "packed": many.packed} | throughput(
        network, many.keep, max(many.texts), many.batches, max(1, rounds // 5), warmup
    )
    del network
    say("a group's rollout")
    rollout = rollout_over_dense(suite.device, suite.dtype, rounds)
    sums = []
    if suite.sums:
        say("column sums of attention")
        sums = compare_sums(suite.device, suite.dtype, suite.sums, rounds)
    say("imports")
    imports = import_times(rounds)
    record = {
        "suite": name,
        "scoring_overhead": cases[-1]["scoring_overhead"]["median"],
        "speedup_over_promise": cases[-1]["speedup_over_promise"],
        "rollout_over_dense": {"time": rollout["time"]["median"], "memory": rollout["memory"]},
        "loop_overhead": cases[-1]["loop_overhead"]["median"],
        "end_to_end_over_model": list(loops[-1]["ivtp"]["over_model"].values())[-1]["median"] if loops else None,
        "import_seconds": imports["ivtp"]["median"],
        "machine": system,
        "limits": best,
        **lists,
        "sums": sums,
        "throughput": batched,
        "rollout": rollout,
        "imports": imports,
    }
    if suite.main_job:
        say(f"ivtp.run {' '.join(MAIN_JOB)}")
        record["main_job_seconds"] = main_job()
    return record


def run_pipeline(rounds: int, model: str | None, say: Callable[[str], None], load: Load | None = None) -> dict:
    """Run the suite of the pipeline and return its record; it has processors and no model."""
    if model:
        raise UserError(
            f"model={model}: suite={PIPELINE} times the processors of LLaVA-1.5 and LLaVA-NeXT; leave it out"
        )
    load = load or Load()
    say(f"{load.images} photographs, {1000 * load.wait:g} ms an image, workers {', '.join(map(str, load.workers))}")
    system = machine("cpu") | {"dtype": f"{1000 * load.wait:g} ms an image"}
    return {"suite": PIPELINE, "machine": system, "pipeline": pipeline(load, rounds)}


def import_times(rounds: int) -> dict:
    """Seconds to import torch in a fresh process, and the additional seconds of all public names of ivtp."""

    def python(code: str) -> Run:
        return Run(lambda: subprocess.run([sys.executable, "-c", code], check=True))

    runs = {"torch": python("import torch"), "both": python(f"import torch\n{IMPORT}")}
    seconds = interleave(runs, rounds)
    more = [both - torch for both, torch in zip(seconds["both"], seconds["torch"], strict=True)]
    return {"torch": summary(seconds["torch"]), "ivtp": summary(more), "over": ratio(seconds["both"], seconds["torch"])}


def main_job() -> float:
    """Seconds of the main job in a process of its own and an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "ivtp.run", *MAIN_JOB, f"output={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"WANDB_MODE": "offline"})
        return time.perf_counter() - start
