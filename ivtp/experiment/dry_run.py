"""`dry_run=true`: every row with its cuts, cost, samples and time, without loading weights."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ivtp import results as store
from ivtp.experiment.planning import Planned, build_shape, build_source, plan_rows
from ivtp.report.console import print_table
from ivtp.report.tables import Column, Table, digits, make_table, ratio
from ivtp.results import Result

TEXT = 64
"""Tokens of a prompt around its image, where no earlier result tells."""


def show(config: DictConfig, rows: list[dict], folder: Path, console) -> None:
    """Print the rows, and the time that they will take at the throughput of earlier results on this model and machine."""
    shape = build_shape(config)
    earlier = list(results_below(Path(config.output), folder, str(config.model.source)))
    text = next((r.text_tokens for r in earlier if r.text_tokens), TEXT) if shape.language else 0
    planned = plan_rows(rows, shape, text, None)
    samples = len(build_source(config, shape)) if config.evaluate else 0
    if config.data.limit is not None:
        samples = min(samples, config.data.limit)
    done = finished(config, folder)
    times = [0.0 if (row.label, request(row)) in done else seconds(row, samples, earlier) for row in planned]
    about = f"{config.name}, {config.model.source}" + (f", {text} text tokens" if shape.language else "")
    print_table(table(about, planned, samples, times), console)
    known = [time for time in times if time is not None]
    total = "unknown" if len(known) < len(times) else duration(sum(known))
    console.print(f"{len(planned)} rows × {samples} samples: {total}; nothing was loaded or written", soft_wrap=True)


def results_below(output: Path, folder: Path, source: str) -> Iterable[Result]:
    """Earlier results on a model, those of this run's folder first."""
    paths = [folder / "results.jsonl", *sorted(output.glob("**/results.jsonl"))]
    for path in dict.fromkeys(path.resolve() for path in paths if path.is_file()):
        results = store.glance(path)
        if any(result.model.get("source") == source for result in results):
            yield from results


def finished(config: DictConfig, folder: Path) -> list[tuple[str, list]]:
    """Labels and requests of the rows that have a result of this code on these data."""
    data: Any = OmegaConf.to_container(config.data)
    code = store.code_version()
    results = store.glance(folder / "results.jsonl")
    same = (r for r in results if r.code == code and not r.failed and {k: r.data.get(k) for k in data} == data)
    return [(r.label, request(r)) for r in same]


def request(row: Result) -> list:
    """Settings of a row, of which its key is made."""
    return [row.pruner, row.budget, row.position_ids]


def seconds(row: Planned, samples: int, earlier: Sequence[Result]) -> float | None:
    """Time of a row: at the rate of the same method and cuts, else at that of any row, in proportion to its FLOPs."""
    rated = [result for result in earlier if result.speed.get("questions_per_second")]
    same = [result for result in rated if (result.pruner, result.cuts) == (row.pruner, row.cuts)]
    if same:
        return samples / same[-1].speed["questions_per_second"]
    if rated:
        other = min(rated, key=lambda result: abs(result.tflops["total"] - row.tflops["total"]))
        return samples / other.speed["questions_per_second"] * row.tflops["total"] / other.tflops["total"]
    return None


def table(title: str, planned: list[Planned], samples: int, times: list[float | None]) -> Table:
    """Table of the rows."""
    first, by_label = planned[0], dict(zip((row.label for row in planned), times, strict=True))
    columns = [
        Column("row", lambda r: r.label),
        Column("cuts", cuts),
        Column("average tokens", lambda r: r.average_tokens, digits),
        Column("GFLOPs", lambda r: 1e3 * r.tflops["total"], digits),
        Column("of unpruned", lambda r: r.tflops["total"] / first.tflops["total"], ratio),
        Column("samples", lambda r: 0 if r.stand_in else samples),
        Column("time", lambda r: {None: "unknown", 0.0: "done"}.get(t := by_label[r.label]) or duration(t or 0)),
    ]
    note = "cuts: visual tokens that stay after a layer (-1: before layer 0), in the ViT and in the LLM."
    return make_table(title, columns, planned, note)


def cuts(row: Planned) -> str:
    """Cuts of a row as LAYER:TOKENS, per site."""
    sites = {"vision": "ViT", "language": "LLM"}
    parts = [
        f"{sites[site]} {' '.join(f'{layer}:{keep}' for layer, keep, _ in some)}"
        for site, some in row.cuts.items()
        if some
    ]
    return ", ".join(parts) or "none"


def duration(seconds: float) -> str:
    """Time in its two largest units.

    >>> duration(42), duration(4000), duration(200_000)
    ('42 s', '1 h 7 min', '2 d 7 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
