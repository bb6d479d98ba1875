"""The table of an experiment: accuracy with errors, cost, paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from ivtp.console import PlainConsole
from ivtp.evaluation.benchmarks import number, own, principal
from ivtp.pruners.budget import asked
from ivtp.report import paper
from ivtp.report.claims import interval
from ivtp.text import one_line


def percent(metric: dict | None, errors: bool = True) -> str:
    """ "71.2 ± 1.0" of a metric with mean and standard error; "–" where there is nothing to average."""
    if not metric or not metric["n"]:
        return "–"
    if metric.get("sd") is not None:
        return f"{100 * metric['mean']:.1f} ± {100 * metric['sd']:.1f} sd" if errors else f"{100 * metric['mean']:.1f}"
    known = errors and metric["se"] is not None and metric["se"] == metric["se"]
    return f"{100 * metric['mean']:.1f}" + (f" ± {100 * metric['se']:.1f}" if known else "")


def compared(comparison: dict) -> str:
    """ "-3.1 [-4.7, -1.5] (p=0.002)" of a paired comparison; no p where a row is a mean over seeds."""
    if comparison["se"] is None or comparison["n"] == 0:
        return "–"
    p = comparison["p"]
    shown = "" if p is None else " (p<0.001)" if p < 0.001 else f" (p={p:.3f})"
    return interval(comparison) + shown


def rate(row: dict) -> str:
    """Questions per second, where the row was run without sharing work, so that it says something about the method."""
    found = row["speed"].get("questions_per_second")
    return f"{found:.0f}{'*' if row['speed'].get('shared') else ''}" if found else "–"


NO_DENSE = "no dense run"


def dense(rows: list[dict]) -> dict | None:
    """The row that percentages of the baseline are of: unpruned, on the same model, data and code; None if there is none."""
    same = [{key: row.get(key) for key in ("model", "data", "code")} for row in rows]
    return next((row for row in rows if row["pruner"]["name"] == "none" and all(s == same[0] for s in same)), None)


def share(value: float | None, whole: float | None, digits: int = 1) -> str:
    """ "98.3 %" of the dense run's; says so where there was none."""
    if whole is None:
        return NO_DENSE
    return f"{100 * value / whole:.{digits}f} %" if value is not None and whole else "–"


def families_of(rows: list[dict]) -> list[str]:
    """The families of questions of all rows; one whose questions all failed is missing in that row."""
    names = dict.fromkeys(key for row in rows for key in row["metrics"])
    return [name.removeprefix("accuracy/") for name in names if name.startswith("accuracy/")]


def levels_of(rows: list[dict]) -> list[str]:
    """Levels of difficulty of all rows, as "size: small"."""
    names = dict.fromkeys(key for row in rows for key in row["metrics"])
    return [name.removeprefix("difficulty/") for name in names if name.startswith("difficulty/")]


def cells(rows: list[dict], comparisons: dict, errors: bool) -> tuple[list[str], Iterator[list[str]]]:
    """Column heads and rows, as text; `errors`: with the standard error in every column, not in the main one only."""
    families = [f"accuracy/{family}" for family in families_of(rows)]
    families = families if len(families) > 1 else []  # of one family the accuracy says it all
    against = list(comparisons[rows[0]["label"]])
    papers = any(row.get("paper") for row in rows)
    words = any(row.get("words") for row in rows)
    failed = any(row.get("failed") for row in rows)
    heads = ["", "asked", "tokens", "average tokens", "GFLOPs", "of unpruned"]
    heads += [family.removeprefix("accuracy/") for family in families]
    metrics_of_task = own(rows[0]["metrics"])
    top = ["top5"] if any("top5" in row["metrics"] for row in rows) else []
    heads += ["accuracy", *top, *(name.partition("/")[2] or name for name in metrics_of_task)]
    heads += ["of dense"] if metrics_of_task else []
    heads += [*(f"− {other}" for other in against), "agrees", "acc_early", "hit", "share"]
    heads += [
        "questions/s",
        *(["failed"] if failed else []),
        *(["words", "no word"] if words else []),
        *(["paper: drop", "paper: cost"] if papers else []),
    ]

    def body() -> Iterator[list[str]]:
        base = dense(rows)
        whole, best = base and base["tflops"]["total"], base and principal(base["metrics"])["mean"]
        for row in rows:
            metrics, total = row["metrics"], row["tflops"]["total"]
            cuts = any(row["cuts"].values())
            line = [row["label"], asked(row["budget"]) if cuts else "–", str(row["tokens"][-1])]
            line += [f"{row['average_tokens']:.4g}" if row.get("average_tokens") is not None else "–"]
            line += [f"{total * 1e3:.4g}", share(total, whole)]
            line += [percent(metrics.get(family), errors) for family in families]
            line += [percent(metrics["accuracy"]), *(percent(metrics.get(name), errors) for name in top)]
            line += [number(metrics[name]) if name in metrics else "–" for name in metrics_of_task]
            line += [share(principal(metrics)["mean"], best)] if metrics_of_task else []
            for other in against:
                line.append("" if other == row["label"] else compared(comparisons[row["label"]][other]))
            agreement = comparisons[row["label"]][against[0]]["agreement"]
            line += ["–" if math.isnan(agreement) else f"{100 * agreement:.1f}"]
            line += [percent(metrics[key], errors) for key in ("acc_early", "hit", "share")]
            line += [rate(row)]
            if failed:
                line += [str(row["failed"]["n"]) if row.get("failed") else "0"]
            if words:
                found = row.get("words")
                line += [f"{found['passing']:.2f}", f"{100 * found['none']:.0f} %"] if found else ["–", "–"]
            yield line + (paper.cells(row.get("paper")) if papers else [])

    return heads, body()


def image_settings(rows: list[dict]) -> list[str]:
    """Settings by which images were made ready for the model: one phrase each."""
    model = rows[0].get("model") or {}
    square = {"pad": "images padded to a square", "crop": "images cropped to a square at the centre"}
    said = [square[model["image_padding"]]] if model.get("image_padding") in square else []
    if model.get("max_crops"):
        fewer = rows[0].get("fewer_crops")
        counted = "" if fewer is None else f" ({fewer} would have had more)"
        said.append(f"images cut into at most {model['max_crops']} crops{counted}")
    return said


def notes(rows: list[dict]) -> str:
    metrics = rows[0]["metrics"]
    n, images = principal(metrics)["n"], metrics["images"]
    about = (
        f"The benchmark's own metrics are in its own unit; of dense: {metrics['score']['name']}, in % of the unpruned run's. "
        "accuracy: what each answer is worth alone. "
        if "score" in metrics
        else ""
    )
    if any(row.get("failed") for row in rows):
        about += (
            "failed: samples without a result, left out of every number; where rows have other ones, only the paired "
            "differences are about the same questions. "
        )
    about += "top5: the right class is among the five likeliest. " if "top5" in metrics else ""
    about += "".join(f"{phrase[0].upper()}{phrase[1:]}. " for phrase in image_settings(rows))
    return about + (
        f"Accuracy in %, n = {n} questions about {images} images, ± standard error (images as clusters; sd: between seeds); "
        "differences are paired on the same questions, with 95 % bootstrap intervals over images, p by McNemar's exact "
        "test. average tokens: visual tokens that enter a language layer. agrees: same answer as the first row. acc_early: "
        "answer read out after part 1. hit: some kept token lies on what is asked about; share: of the kept tokens that do. "
        "questions/s: * with work shared between rows. words: of the instruction that pass τ, per question; no word: questions "
        f"without any. paper: the same row there, on LLaVA-1.5; {paper.NOTE}"
    )


def print_table(rows: list[dict], comparisons: dict, console: Console) -> None:
    heads, body = cells(rows, comparisons, errors=False)
    table = Table(title=rows[0]["experiment"], caption=notes(rows), pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    section = rows[0]["section"]
    for row, line in zip(rows, body, strict=True):
        if row["section"] != section:
            table.add_section()
            section = row["section"]
        table.add_row(*line)
    show(table, console)


def as_markdown(rows: list[dict], comparisons: dict) -> str:
    heads, body = cells(rows, comparisons, errors=True)
    lines = [
        f"# {escape(rows[0]['experiment'])}",
        "",
        "| " + " | ".join(map(escape, heads)) + " |",
        "|---" + "|--:" * (len(heads) - 1) + "|",
    ]
    section = None
    for row, line in zip(rows, body, strict=True):
        if row["section"] != section and row["section"]:
            lines.append(f"| *{escape(row['section'])}* |" + " |" * (len(heads) - 1))
        section = row["section"]
        lines.append("| " + " | ".join(escape(cell) for cell in line) + " |")
    return "\n".join([*lines, "", escape(notes(rows)), ""])


def escape(text: str) -> str:
    """A text cannot break out of its cell, be taken for HTML or code, or load an image."""
    text = one_line(text.replace("\n", " ")).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")


def markdown(title: str, heads: list[str], lines: list[list[str]], note: str = "") -> str:
    """Any other table, below the main one."""
    rows = ["| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines]
    head = [
        "",
        f"## {escape(title)}",
        "",
        "| " + " | ".join(map(escape, heads)) + " |",
        "|---" + "|--:" * (len(heads) - 1) + "|",
    ]
    return "\n".join([*head, *rows, *(["", escape(note)] if note else []), ""])


def print_other(title: str, heads: list[str], lines: list[list[str]], console: Console, note: str = "") -> None:
    table = Table(title=title, caption=note or None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", overflow="fold", max_width=60)
    for line in lines:
        table.add_row(*line)
    show(table, console)


def show(table: Table, console: Console) -> None:
    """Print a table; to a pipe, which has no width, as wide as it is, since wrapped cells cannot be read."""
    if not console.is_terminal:
        width = console.measure(table, options=console.options.update(width=1000)).maximum
        console = PlainConsole(file=console.file, width=width)
    console.print(table)
