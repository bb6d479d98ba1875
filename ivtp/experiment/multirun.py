"""Jobs of a multirun: the folder of each, its record, and one report over all of them at the end.

Jobs may run in other processes and on other machines, so that what the sweep has to know of them is in their folders.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ivtp import signals
from ivtp.registry import UserError
from ivtp.text import one_line

WHERE = ("output", "name", "logger", "dry_run", "plugins")
"""Keys that say where results go or what is printed, and so are no part of a job's name."""
LONGEST = 120
SWEEP = "IVTP_SWEEP"
"""Environment variable of the jobs of one sweep; Hydra hands it to them wherever they run."""
RECORD = "job.json"


def job_folder(overrides: Sequence[str]) -> str:
    """Name of a job's folder: its overrides, so that the same ones lead to the same folder, as text for any file system.

    >>> job_folder(["pruner=topk", "budget.keep=32", "output=elsewhere"])
    'pruner=topk,budget.keep=32'
    """
    whole = ",".join(named(overrides)) or "job"
    safe = re.sub(r"[^\w.=,+~@-]+", "_", whole, flags=re.ASCII).strip("_")
    if safe == whole and len(whole) <= LONGEST:
        return whole
    return f"{safe[:LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def named(overrides: Iterable[str]) -> list[str]:
    """Overrides that tell a job from others, each once."""
    return list(dict.fromkeys(o for o in overrides if re.split(r"[.=@]", o.lstrip("+~"), maxsplit=1)[0] not in WHERE))


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


class Sweep(Callback):
    """Hydra's callback that tells this process where a multirun has its jobs."""

    folders: ClassVar[list[Path]] = []

    def on_multirun_start(self, config: DictConfig, **_) -> None:
        """Note the folder of the sweep."""
        self.folders.append(Path(config.hydra.sweep.dir))


def evaluate(config: DictConfig, folder: Path) -> float | tuple[float, float] | None:
    """Run one job of a multirun; return what a sweeper optimises."""
    from ivtp import results as store
    from ivtp.experiment import ranks
    from ivtp.experiment.config import finish, own_folders
    from ivtp.experiment.run import run

    about = HydraConfig.get()
    overrides = list(about.overrides.task)
    job = {"sweep": os.environ.get(SWEEP), "number": about.job.num, "overrides": overrides, "error": None}
    try:
        # A launcher may have started this process, with signal handlers of its own.
        with signals.handled():
            results = run(finish(config, overrides, own_folders()), folder, siblings=folder.parent)
    except UserError as error:
        if ranks.first():
            store.replace(folder / RECORD, store.as_json(job | {"error": one_line(str(error))}))
        raise
    if ranks.first() and not config.dry_run:
        store.replace(folder / RECORD, store.as_json(job))
    return ranks.shared(lambda: objective(results, about.sweeper.get("direction")))


def objective(results: list, direction: object) -> float | tuple[float, float] | None:
    """Accuracy of the last row, the mean over its seeds; with two directions also its TFLOPs."""
    from ivtp.evaluation.task_metrics import principal

    if not results:
        return None
    last = results[-1]
    rows = [row for row in results if (row.seeds_of or row.label) == (last.seeds_of or last.label)]
    accuracy = mean(principal(row.metrics)["mean"] for row in rows)
    return (accuracy, last.tflops["total"]) if OmegaConf.is_list(direction) and len(direction) == 2 else accuracy  # type: ignore[arg-type]


def jobs_of(folder: Path, sweep: str) -> list[tuple[Path, dict]]:
    """Folders and records of the jobs of one sweep, in their order."""
    records = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob(f"*/{RECORD}")]
    return sorted([job for job in records if job[1]["sweep"] == sweep], key=lambda job: job[1]["number"])


def report(folder: Path, sweep: str) -> None:
    """Write one table and page over the jobs of a sweep into `merged/`, in a folder each for several models or data.

    Raises UserError, at the end, if jobs have failed.
    """
    from ivtp.experiment import ranks
    from ivtp.report.console import PlainConsole
    from ivtp.report.merge import alike, merge, sources

    if not ranks.first():
        return
    console, jobs = PlainConsole(), jobs_of(folder, sweep)
    failed = [(place, job["error"]) for place, job in jobs if job["error"] is not None]
    done = [(place, _keys(job["overrides"])) for place, job in jobs if job["error"] is None]
    done = [(place, keys) for place, keys in done if (place / "results.jsonl").is_file()]
    groups = alike(sources(done))
    for group in groups:
        first = group[0].results[0]
        name = job_folder([str(first.model["source"]), str(first.data["name"]), first.key[:4]])
        merge(group, folder / "merged" / name if len(groups) > 1 else folder / "merged", console)
    for place, error in failed:
        console.print(f"{place.name}: {error}", soft_wrap=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} jobs failed; the first, {failed[0][0].name}: {failed[0][1]}")


def _keys(overrides: Iterable[str]) -> dict[str, str]:
    return {key: value for key, _, value in (override.partition("=") for override in named(overrides))}
