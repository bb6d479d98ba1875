"""`report.html`, a page in one file: table, plots, and a viewer of the tokens that every cut kept.

The page is a Jinja template with autoescape; its data is JSON that cannot close its own script element; its plots are
Vega-Lite, whose JavaScript is bundled into the file; a Content-Security-Policy forbids it every request.
"""

import base64
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from ivtp import results as store
from ivtp.data.outcomes import Outcome
from ivtp.evaluation.task_metrics import principal
from ivtp.report.overlap import Overlap
from ivtp.report.plots import accuracy_cost, bounds, scale, with_texts
from ivtp.report.tables import Table, families_of, image_settings, levels_of
from ivtp.results import Result
from ivtp.text import printable

HERE = Path(__file__).parent
SITES = {"vision": "ViT", "language": "LLM"}
AFTER = {"attn": "between attention and FFN", "block": "after the FFN"}


@dataclass(frozen=True)
class Report:
    """Contents of a report; outcomes, failures and comparisons are by label, seeds are drawn together."""

    results: list[Result]
    outcomes: dict[str, list[Outcome]]
    failed: dict[str, list[Outcome]]
    comparisons: dict[str, dict[str, dict]]
    claims: list[dict]
    overlaps: list[Overlap]
    table: Table
    others: list[Table]
    question: str = ""
    compare_to: str | None = None


def write_page(folder: Path, report: Report) -> Path:
    """Write `report.html` into `folder`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    page = environment.get_template("page.html.j2").render(
        title=report.table.title,
        question=report.question,
        table=report.table,
        sections=sections(report.table),
        others=report.others,
        facts=facts(report.results),
        # A page cannot show NaN, control characters and lone surrogates.
        data=with_texts(store.finite(payload(folder, report)), printable),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        js=(HERE / "page.js").read_text(encoding="utf-8"),
        vega=vega(),
    )
    path = folder / "report.html"
    store.replace(path, page.encode(errors="replace"))
    return path


@cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script without network."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed; window.vega = vega;")
    return re.sub("<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def sections(table: Table) -> list[tuple[str, list[tuple[int, list[str]]]]]:
    """Runs of lines of one section, as (name, [(number of the row, its cells)])."""
    lines = enumerate(table.lines)
    return [(name, [next(lines) for _ in run]) for name, run in groupby(table.sections)]


def facts(results: list[Result]) -> dict[str, str]:
    """Circumstances of the results, for the foot of the page."""
    first = results[0]
    data = {key: value for key, value in first.data.items() if key != "hash" and value is not None}
    commits = dict.fromkeys(str(result.git) for result in results)
    failed = max(result.failed["n"] if result.failed else 0 for result in results)
    model = [first.model["source"], first.model["dtype"], f"hash {first.model['hash']}", *image_settings(results)]
    return {
        "questions": str(principal(first.metrics)["n"]),
        **({"failed samples": f"up to {failed} in a row of the table"} if failed else {}),
        "images": str(first.metrics["images"]),
        "data": ", ".join(f"{key} {value}" for key, value in data.items()),
        "data hash": str(first.data.get("hash", "unknown")),
        "model": ", ".join(model),
        "prompt": first.prompt,
        "seed": str(first.seed),
        "commit": ", ".join(commits) + f" (code {first.code})",
        "versions": ", ".join(f"{name} {number}" for name, number in first.versions.items()),
        "machine": ", ".join(f"{name} {value}" for name, value in first.machine.items()),
        "time": f"{min(result.time for result in results)} to {max(result.time for result in results)}",
    }


class Index(dict):
    """Values numbered in the order of their first use."""

    def __call__(self, value) -> int:
        """Number of a value."""
        return self.setdefault(value, len(self))


def payload(folder: Path, report: Report) -> dict:
    """Data of the page's script; repeated texts are stored once and referred to by number."""
    texts, words, pictures = Index(), Index(), Index()
    samples = _samples(folder, report, pictures)
    numbers = {sample["id"]: number for number, sample in enumerate(samples)}
    rows = []
    for result in report.results:
        failed = {numbers[o["id"]]: texts(o["failed"]) for o in report.failed.get(result.label, [])}
        outcomes = {outcome["id"]: outcome for outcome in report.outcomes[result.label]}
        rows.append(_row(result, outcomes, samples, texts, words) | {"failed": failed})
    plots = {
        name: accuracy_cost(report.results, report.table.heads, narrow=name == "narrow") for name in ("wide", "narrow")
    }
    plots["narrow"].pop("datasets")  # the same points
    return {
        "rows": rows,
        "cells": report.table.lines,
        "plots": plots,
        "families": families_of(report.results) + levels_of(report.results),
        "samples": samples,
        "pictures": [
            "data:image/webp;base64," + base64.b64encode((folder / "viewer" / name).read_bytes()).decode()
            for name in pictures
        ],
        "texts": list(texts),
        "words": [list(each) for each in words],
        "compare_to": report.compare_to,
    }


def _samples(folder: Path, report: Report, pictures: Index) -> list[dict]:
    """Samples that some row answered or failed on, with their stored pictures."""
    stored = {sample["id"]: sample for sample in store.read(folder / "viewer" / "samples.jsonl")[0]}
    by_id = {
        outcome["id"]: outcome
        for result in report.results
        for outcome in [*report.outcomes[result.label], *report.failed.get(result.label, [])]
    }
    samples = []
    for name, outcome in by_id.items():
        sample = {field: outcome[field] for field in ("id", "image", "family", "question", "answer")}
        levels = (f"{kind}: {level}" for kind, level in outcome.get("difficulty", {}).items())
        sample["groups"] = [outcome["family"], *levels]
        picture = stored.get(name)
        if picture is not None and (folder / "viewer" / picture["picture"]).is_file():
            sample |= {"picture": pictures(picture["picture"]), "target": picture["target"]}
        samples.append(sample)
    return samples


def _row(result: Result, by_id: dict[str, Outcome], samples: list[dict], texts: Index, words: Index) -> dict:
    """Row for the script; per-sample lists are in the order of `samples`, -1 or null for a sample without an answer."""
    pruner = result.pruner
    accuracy = {
        name.removeprefix("difficulty/").removeprefix("accuracy").removeprefix("/"): bounds(metric)
        for name, metric in result.metrics.items()
        if name.startswith(("accuracy", "difficulty/"))
    }
    outcomes = [by_id.get(sample["id"]) for sample in samples]
    shown = {
        i: outcome
        for i, (outcome, sample) in enumerate(zip(outcomes, samples, strict=True))
        if outcome and "picture" in sample
    }
    return {
        "label": result.label,
        "series": result.series or result.label,
        "section": result.section,
        "accuracy": accuracy | {"": bounds(principal(result.metrics), scale(result))},
        "seeds": result.seeds,
        "cuts": [
            f"{SITES[site]}, before layer 0" if layer < 0 else f"{SITES[site]} layer {layer}, {AFTER[after]}"
            for site, cuts in result.cuts.items()
            for layer, _, after in cuts
        ],
        "tau": pruner.get("tau") if pruner.get("reference") == "pseudo_cls" else None,
        "predictions": [texts(answer_of(o)) if o else -1 for o in outcomes],
        "early": [texts(o["early"]) if o and o.get("early") is not None else -1 for o in outcomes],
        "right": [float(o["correct"]) if o and o["correct"] is not None else None for o in outcomes],
        "lived": {i: o["lived"] for i, o in shown.items() if "lived" in o},
        "words": {
            i: [words(tuple(word for word, _ in o["words"])), *(score for _, score in o["words"])]
            for i, o in shown.items()
            if o.get("words")
        },
    }


def answer_of(outcome: Outcome) -> str:
    """Answer as text; if several seeds disagree, each one with its count."""
    counts = Counter(outcome.get("predictions") or [outcome["prediction"]]).most_common()
    return ", ".join(f"{text} ×{count}" for text, count in counts) if len(counts) > 1 else counts[0][0]
