"""Run of an experiment: check the request, then evaluate its rows and report on them."""

import os
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ivtp import results as store
from ivtp.registry import UnknownName, unknown
from ivtp.results import Result


def run(config: DictConfig, folder: Path, siblings: Path | None = None) -> list[Result]:
    """Evaluate every row that has no result yet, report on all, and return the results, in rank 0.

    The config is that of a Hydra job, which every rank composes for itself.

    siblings  folder with the folders of other jobs of a sweep, whose unpruned rows are this one's too
    """
    from ivtp.experiment.config import arguments_of_job
    from ivtp.experiment.variants import variants

    rows = list(variants(config))
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    if config.dry_run:
        from ivtp.experiment import dry_run

        dry_run.show(config, rows, folder, begin(config, rows, folder))
        with suppress(OSError):  # not empty: of an earlier run
            os.removedirs(folder)  # which Hydra has made
        return []

    # What follows imports Lightning: an error in the request does not wait for it.
    from ivtp.experiment import ranks

    count = ranks.to_launch(config.trainer) if config.evaluate else 1
    if count > 1:
        if siblings is not None:
            with store.only_writer(folder):
                adopt(folder, siblings)
        ranks.launch(arguments_of_job(folder), count)
        return store.finished(folder)[0]
    ranks.start(config.trainer)
    with ranks.only_writers(folder):
        if siblings is not None and ranks.first():
            adopt(folder, siblings)
        return work(config, rows, folder)


def begin(config: DictConfig, rows: list[dict], folder: Path, quiet: bool = False):
    """Print what is run and check what only its rows tell; return the console."""
    from ivtp.experiment.planning import quiet_libraries
    from ivtp.report import paper
    from ivtp.report.console import PlainConsole

    console = PlainConsole(quiet=quiet)  # standard error is for what went wrong
    console.print(f"{config.name}: {len(rows)} rows → {folder}", soft_wrap=True)
    quiet_libraries()
    paper.check(config.paper, rows)
    check_claims(config, rows)
    return console


def work(config: DictConfig, rows: list[dict], folder: Path) -> list[Result]:
    """Cost, evaluation and report, in every rank; rank 0 alone prints and writes."""
    from ivtp.experiment import ranks
    from ivtp.experiment.costs import write_costs
    from ivtp.report import loggers

    console = begin(config, rows, folder, quiet=not ranks.first())
    if ranks.first():
        loggers.check(config.logger, folder)
        store.replace(folder / "config.yaml", OmegaConf.to_yaml(config).encode())
        write_costs(config, rows, folder, console)
    if not config.evaluate:
        return []
    from ivtp.experiment.steps import evaluate

    return evaluate(config, [row for row in rows if not row["stand_in"]], folder, console)


def adopt(folder: Path, siblings: Path) -> None:
    """Copy unpruned rows of other jobs that this one lacks: they count here where model, data and code are the same.

    Other jobs may be writing: their files are left as they are, and what is copied is checked as all outcomes are.
    """
    path = folder / "results.jsonl"
    known = {result.key for result in store.read_results(path)[0]}
    for other in sorted(siblings.glob("*/results.jsonl")):
        if other.parent.resolve() == folder.resolve() or other.parent.name == "merged":
            continue
        for result in store.glance(other):
            outcomes = other.parent / "outcomes" / f"{result.key}.jsonl"
            if result.pruner["name"] == "none" and result.key not in known and not result.failed and outcomes.is_file():
                known.add(result.key)
                store.replace(folder / "outcomes" / outcomes.name, outcomes.read_bytes())
                store.append_results(path, [result])


def check_claims(config, rows: list[dict]) -> None:
    """Raise UnknownName for an unknown row to compare to, row of a claim (seeds by their common label) or section."""
    labels = {row["seeds_of"] or row["label"] for row in rows}
    named = [config.compare_to] if config.compare_to is not None else []
    for name in [*named, *(row for claim in config.claims for row in claim["rows"])]:
        if name not in labels:
            raise UnknownName(unknown("row to compare to", str(name), labels))
    sections = {row["section"] for row in rows}
    if config.overlap is not None and config.overlap not in sections:
        raise UnknownName(unknown("section to show the overlap of:", str(config.overlap), sections))
