"""`report.html`: one file that needs nothing else: table, plots, and a viewer of what every cut kept.

The page is a Jinja template with autoescape; its data is JSON that cannot close its own script element; its plots are
Vega-Lite, whose JavaScript is bundled into the file; a Content-Security-Policy forbids it every request.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ivtp import records
from ivtp.evaluation.benchmarks import principal
from ivtp.report.tables import cells, families_of, image_settings, levels_of, notes
from ivtp.text import printable

HERE = Path(__file__).parent
SITES = {"vision": "ViT", "language": "LLM"}
AFTER = {"attn": "between attention and FFN", "block": "after the FFN"}


def write_page(
    folder: Path,
    rows: list[dict],
    outcomes: dict,
    comparisons: dict,
    question: str = "",
    compare_to: str | None = None,
    others: Sequence[tuple] = (),
    failed: dict[str, list[dict]] | None = None,
) -> Path:
    """Write `report.html` into `folder`; outcomes and comparisons are by label.

    others  further tables below the main one: (title, heads, lines) or (title, heads, lines, note)
    failed  outcomes of samples without a result, by label
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    heads, lines = table(rows, comparisons)
    page = environment.get_template("page.html.j2").render(
        title=rows[0]["experiment"],
        question=question,
        heads=heads,
        sections=sections(rows, lines),
        notes=notes(rows),
        others=[(*other, "") if len(other) == 3 else other for other in others],
        facts=facts(rows),
        data=clean(payload(folder, rows, outcomes, heads, lines, failed or {}) | {"compare_to": compare_to}),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        js=(HERE / "page.js").read_text(encoding="utf-8"),
        vega=vega(),
    )
    path = folder / "report.html"
    records.replace(path, page.encode(errors="replace"))
    return path


def clean(value):
    """The page's data without what a page cannot show: NaN, control characters, lone surrogates."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {clean(key): clean(each) for key, each in value.items()}
    return [clean(each) for each in value] if isinstance(value, (list, tuple)) else records.finite(value)


@cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script without network."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed; window.vega = vega;")
    return re.sub("<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def table(rows: list[dict], comparisons: dict) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of table.md; what one looks for first stands first."""
    heads, body = cells(rows, comparisons, errors=True)
    heads, lines = ["method", *heads[1:]], [list(line) for line in body]
    place = heads.index("accuracy")
    for line in (heads, *lines):
        line.insert(1, line.pop(place))
    return heads, lines


def sections(rows: list[dict], lines: list[list[str]]) -> list[tuple[str, list[tuple[int, list[str]]]]]:
    """Runs of rows of one section: (name, [(number of the row, its cells)])."""
    found: list[tuple[str, list]] = []
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        if not found or found[-1][0] != row["section"]:
            found.append((row["section"], []))
        found[-1][1].append((number, line))
    return found


def facts(rows: list[dict]) -> dict[str, str]:
    """What the results depend on, for the foot of the page."""
    row = rows[0]
    data = {key: value for key, value in row["data"].items() if key != "hash" and value is not None}
    machine = row["machine"]
    commits = dict.fromkeys(str(r.get("git")) for r in rows)
    failed = max(r["failed"]["n"] if r.get("failed") else 0 for r in rows)
    return {
        "questions": str(principal(row["metrics"])["n"]),
        **({"failed samples": f"up to {failed} in a row of the table"} if failed else {}),
        "images": str(row["metrics"]["images"]),
        "data": ", ".join(f"{key} {value}" for key, value in data.items()),
        "data hash": str(row["data"].get("hash", "unknown")),
        "model": ", ".join(
            [row["model"]["source"], row["model"]["dtype"], f"hash {row['model']['hash']}", *image_settings(rows)]
        ),
        "prompt": row["prompt"],
        "seed": str(row["seed"]),
        "commit": ", ".join(commits) + f" (code {row['code']})",
        "versions": ", ".join(f"{name} {number}" for name, number in row["versions"].items()),
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()),
        "made": f"{min(r['time'] for r in rows)} to {max(r['time'] for r in rows)}",
    }


class Index(dict):
    """Values numbered in the order in which they are first asked for."""

    def __call__(self, value) -> int:
        return self.setdefault(value, len(self))


def payload(
    folder: Path,
    rows: list[dict],
    outcomes: dict,
    heads: list[str],
    lines: list[list[str]],
    failed: dict[str, list[dict]],
) -> dict:
    """All that the page's script reads. Texts that repeat are stored once, and referred to by number."""
    texts, words = Index(), Index()
    stored = {sample["id"]: sample for sample in records.read(folder / "viewer" / "samples.jsonl")[0]}
    samples = {o["id"]: o for row in rows for o in [*outcomes[row["label"]], *failed.get(row["label"], [])]}
    pictures = Index()
    listed, listed_at = [], {name: place for place, name in enumerate(samples)}
    for key, o in samples.items():
        picture = stored.get(key)
        shown = picture is not None and (folder / "viewer" / picture["picture"]).is_file()
        about = {name: o[name] for name in ("id", "image", "family", "question", "answer")}
        about["groups"] = [o["family"], *(f"{name}: {level}" for name, level in o.get("difficulty", {}).items())]
        listed.append(about | ({"picture": pictures(picture["picture"]), "asked": picture["asked"]} if shown else {}))
    return {
        "rows": [
            one(row, {o["id"]: o for o in outcomes[row["label"]]}, listed, texts, words)
            | {"failed": {listed_at[o["id"]]: texts(o["failed"]) for o in failed.get(row["label"], [])}}
            for row in rows
        ],
        "heads": heads,
        "cells": lines,
        "measure": rows[0]["metrics"]["score"]["name"] if "score" in rows[0]["metrics"] else "accuracy, %",
        "families": families_of(rows) + levels_of(rows),
        "samples": listed,
        "pictures": [data_uri(folder / "viewer" / name) for name in pictures],
        "texts": list(texts),
        "words": [list(each) for each in words],
    }


def data_uri(path: Path) -> str:
    return "data:image/webp;base64," + base64.b64encode(path.read_bytes()).decode()


def one(row: dict, by_id: dict[str, dict], samples: list[dict], texts: Index, words: Index) -> dict:
    """A row for the script; its per-sample lists are in the order of `samples`, -1 or null where it has no answer."""
    pruner = row["pruner"]
    accuracies = {
        key.removeprefix("difficulty/"): m
        for key, m in row["metrics"].items()
        if key.startswith(("accuracy", "difficulty/"))
    }
    found = [by_id.get(sample["id"]) for sample in samples]
    seen = [o if o and "picture" in sample else None for o, sample in zip(found, samples, strict=True)]
    return {
        "label": row["label"],
        "series": row.get("series", row["label"]),
        "section": row["section"],
        "gflops": row["tflops"]["total"] * 1e3,
        "accuracy": {key.removeprefix("accuracy").removeprefix("/"): interval(m) for key, m in accuracies.items()}
        | ({"": interval(row["metrics"]["score"], 1)} if "score" in row["metrics"] else {}),
        "seeds": row.get("seeds"),
        "cuts": [
            f"{SITES[site]}, before layer 0" if layer < 0 else f"{SITES[site]} layer {layer}, {AFTER[after]}"
            for site, cuts in row["cuts"].items()
            for layer, _, after in cuts
        ],
        "tau": pruner.get("tau") if pruner.get("reference") == "pseudo_cls" else None,
        "predictions": [texts(said(o)) if o else -1 for o in found],
        "early": [texts(o["early"]) if o and o.get("early") is not None else -1 for o in found],
        "right": [float(o["correct"]) if o and o["correct"] is not None else None for o in found],
        "lived": {i: o["lived"] for i, o in enumerate(seen) if o and "lived" in o},
        "words": {
            i: [words(tuple(word for word, _ in o["words"])), *(score for _, score in o["words"])]
            for i, o in enumerate(seen)
            if o and o.get("words")
        },
    }


def said(outcome: dict) -> str:
    """The answer; of several seeds that disagree, each with its count."""
    counts = Counter(outcome.get("predictions") or [outcome["prediction"]]).most_common()
    return ", ".join(f"{text} ×{count}" for text, count in counts) if len(counts) > 1 else counts[0][0]


def interval(metric: dict, scale: int = 100) -> list[float | None]:
    """Mean, low and high, in percent: one standard error, or of several seeds their standard deviation, to each side."""
    mean, error = metric["mean"], metric.get("se") if metric.get("sd") is None else metric["sd"]
    if mean is None:
        return [None, None, None]
    return [scale * x for x in (mean, mean - (error or 0), mean + (error or 0))]
