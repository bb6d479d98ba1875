"""The suite `lead`: every pruner on one small LLaVA, time and peak memory, beside another checkout of ivtp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ivtp.pruners import shipped_pruners
from ivtp.registry import UnknownName, UserError, unknown
from ivtp.timing import worker
from ivtp.timing.measure import machine, ratio, summary
from ivtp.timing.models import CLIP_TEXT, LLAMA_1B, VIT_L, Size

SUITE = "lead"
OWN, NONE = "own forward", "none"
LEAD = Size(
    "ViT 12 × 512 at 336 px + Llama 12 × 768",
    {**VIT_L, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"projection_dim": 512},
    {**LLAMA_1B, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"num_key_value_heads": 12, "vocab_size": 8000},
    {**CLIP_TEXT, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"projection_dim": 128},
)
TOME = {"model": worker.TIMM, "batch": 16}


@dataclass(frozen=True)
class Lead:
    """Pruners (none given: all) at each number of visual tokens and each batch size; `against`: another checkout."""

    pruners: tuple[str, ...] = ()
    keep: tuple[int, ...] = (64, 192)
    batch: tuple[int, ...] = (1, 8)
    rounds: int = 5
    against: str | None = None
    size: Size = LEAD
    text: int = 64

    def cases(self) -> list[dict[str, Any]]:
        """Cases by pruner, tokens kept and batch size: the model's own forward and our loop without a pruner first."""
        known = [name for name in shipped_pruners() if name != NONE]
        for name in self.pruners:
            if name not in known:
                raise UnknownName(unknown("pruner", name, known))
        cases: list[dict[str, Any]] = []
        for batch in self.batch:
            cases += [{"pruner": name, "keep": None, "batch": batch} for name in (None, NONE)]
            cases += [
                {"pruner": name, "keep": keep, "batch": batch} for keep in self.keep for name in self.pruners or known
            ]
        if self.size is LEAD and (not self.pruners or "tome" in self.pruners):
            cases += [{**TOME, "pruner": None, "keep": None}, {**TOME, "pruner": "tome", "keep": worker.MERGED}]
        return cases


Ask = Callable[[dict, str], dict]
"""Answer of a worker to a case and what is wanted of it: "seconds" or "peak"."""


@contextmanager
def working(checkout: Path, size: Size, text: int) -> Iterator[Ask]:
    """Context with a worker process on a checkout of ivtp."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [sys.executable, worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None and process.stdout is not None
    given, answers = process.stdin, process.stdout

    def write(line: dict) -> None:
        given.write(json.dumps(line) + "\n")
        given.flush()

    def ask(case: dict, wanted: str) -> dict:
        write({"case": case, "wanted": wanted})
        answer = answers.readline()
        if not answer:
            raise UserError(f"against={checkout}: its worker process ended with status {process.wait()}; see above")
        return json.loads(answer)

    try:
        write({"size": asdict(size), "text": text})
        yield ask
    finally:
        given.close()
        process.wait()


def run(lead: Lead, say: Callable[[str], None] = lambda line: None) -> dict:
    """Time all cases, alternating, on this checkout and on the other one; returns the record."""
    checkouts = {"this": Path(__file__).resolve().parents[2]}
    if lead.against is not None:
        checkouts["against"] = Path(lead.against).resolve()
        if not (checkouts["against"] / "ivtp" / "__init__.py").is_file():
            raise UserError(f"against={lead.against} is no checkout of ivtp; name a folder that has ivtp/__init__.py")
    cases = lead.cases()
    with ExitStack() as stack:
        asked = {name: stack.enter_context(working(path, lead.size, lead.text)) for name, path in checkouts.items()}
        say(f"{len(cases)} cases on {lead.size.name}: peak memory")
        peaks = [{name: ask(case, "peak") for name, ask in asked.items()} for case in cases]
        able = [i for i, peak in enumerate(peaks) if "error" not in peak["this"]]
        seconds = alternate([cases[i] for i in able], asked, lead.rounds, say)
    commits = {name: commit(path) for name, path in checkouts.items()}
    records = [
        record(cases[i], seconds[k], {name: peak.get("peak") for name, peak in peaks[i].items()})
        for k, i in enumerate(able)
    ]
    for found in records:
        alike = (r for r in records if (r["model"], r["batch"]) == (found["model"], found["batch"]))
        base = next(r for r in alike if r["pruner"] == OWN)
        found["over_own"] = ratio(found["seconds"]["this"], base["seconds"]["this"])
        found["peak_of_own"] = found["peak_bytes"]["this"] / base["peak_bytes"]["this"]
    for found in records:
        found["seconds"] = {name: summary(values) for name, values in found["seconds"].items()}
    left_out = {
        case["pruner"]: peak["this"]["error"]
        for case, peak in zip(cases, peaks, strict=True)
        if "error" in peak["this"]
    }
    system = machine("cpu", "sdpa") | {"dtype": "float32"}
    about = {"model": lead.size.name, "text": lead.text, "commits": commits}
    return {"suite": SUITE, "machine": system, "lead": about | {"cases": records, "left_out": left_out}}


def alternate(
    cases: Sequence[dict], asked: dict[str, Ask], rounds: int, say: Callable[[str], None]
) -> list[dict[str, list[float]]]:
    """Seconds of every case per checkout in every round, after one that warms up.

    Checkouts alternate within a case (A B, B A) and cases within a round, so that changes of the machine's speed affect
    all of them.
    """
    seconds: list[dict[str, list[float]]] = [defaultdict(list) for _ in cases]
    for number in range(-1, rounds):
        say(f"round {number + 1} of {rounds}" if number >= 0 else "warm-up")
        forward = number % 2 == 0
        for i in range(len(cases)) if forward else reversed(range(len(cases))):
            for name in asked if forward else reversed(asked):
                answer = asked[name](cases[i], "seconds")
                if number >= 0 and "seconds" in answer:
                    seconds[i][name].append(answer["seconds"])
    return seconds


def record(case: dict, seconds: dict[str, list[float]], peaks: dict[str, int | None]) -> dict[str, Any]:
    """Record of a case, with the seconds of every round."""
    found = {
        "model": case.get("model", "llava"),
        "pruner": case["pruner"] or OWN,
        "keep": case["keep"],
        "batch": case["batch"],
        "seconds": dict(seconds),
        "images_per_second": case["batch"] / median(seconds["this"]),
        "peak_bytes": peaks,
    }
    if "against" in seconds:
        found["over_against"] = ratio(seconds["this"], seconds["against"])
    return found


def commit(checkout: Path) -> str:
    """Commit of a checkout, or its folder where git does not know it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or str(checkout)
    except OSError:
        return str(checkout)
