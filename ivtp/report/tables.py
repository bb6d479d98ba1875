"""The table of an experiment: accuracy with errors, cost, paired comparisons."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table


def percent(metric: dict, errors: bool = True) -> str:
    """"71.2 ± 1.0" of a metric with mean and standard error; "–" where there is nothing to average."""
    if not metric["n"]:
        return "–"
    known = errors and metric["se"] is not None and metric["se"] == metric["se"]
    return f"{100 * metric['mean']:.1f}" + (f" ± {100 * metric['se']:.1f}" if known else "")


def compared(comparison: dict) -> str:
    """"-3.1 ± 0.8 (p=0.002)" of a paired comparison."""
    if comparison["se"] is None or comparison["n"] == 0:
        return "–"
    p = comparison["p"]
    shown = "p<0.001" if p < 0.001 else f"p={p:.3f}"
    return f"{100 * comparison['difference']:+.1f} ± {100 * comparison['se']:.1f} ({shown})"


def cells(rows: list[dict], comparisons: dict, errors: bool) -> tuple[list[str], Iterator[list[str]]]:
    """Column heads and rows, as text; `errors`: with the standard error in every column, not in the main one only."""
    families = [key for key in rows[0]["metrics"] if key.startswith("accuracy/")]
    against = list(comparisons[rows[0]["label"]])
    heads = ["", "tokens", "GFLOPs", "of unpruned"]
    heads += [family.removeprefix("accuracy/") for family in families]
    heads += ["accuracy", *(f"− {other}" for other in against), "agrees", "acc_early", "hit", "share"]

    def body() -> Iterator[list[str]]:
        whole = rows[0]["tflops"]["total"]
        for row in rows:
            metrics, total = row["metrics"], row["tflops"]["total"]
            line = [row["label"], str(row["tokens"][-1]), f"{total * 1e3:.4g}", f"{100 * total / whole:.1f} %"]
            line += [percent(metrics[family], errors) for family in families]
            line += [percent(metrics["accuracy"])]
            for other in against:
                line.append("" if other == row["label"] else compared(comparisons[row["label"]][other]))
            line += [f"{100 * comparisons[row['label']][against[0]]['agreement']:.1f}"]
            line += [percent(metrics[key], errors) for key in ("acc_early", "hit", "share")]
            yield line

    return heads, body()


def notes(rows: list[dict]) -> str:
    n, images = rows[0]["metrics"]["accuracy"]["n"], rows[0]["metrics"]["images"]
    return (
        f"Accuracy in %, n = {n} questions about {images} images, ± standard error (images as clusters); differences are "
        "paired on the same questions, p by McNemar's exact test. agrees: same answer as the first row. acc_early: "
        "answer read out after part 1. hit: some kept token lies on what is asked about; share: of the kept tokens that do."
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
    if not console.is_terminal:  # a pipe has no width, and wrapped cells cannot be read
        console = Console(file=console.file, width=console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def as_markdown(rows: list[dict], comparisons: dict) -> str:
    heads, body = cells(rows, comparisons, errors=True)
    lines = [f"# {rows[0]['experiment']}", "", "| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    section = None
    for row, line in zip(rows, body, strict=True):
        if row["section"] != section and row["section"]:
            lines.append(f"| *{escape(row['section'])}* |" + " |" * (len(heads) - 1))
        section = row["section"]
        lines.append("| " + " | ".join(escape(cell) for cell in line) + " |")
    return "\n".join([*lines, "", notes(rows), ""])


def escape(text: str) -> str:
    """A label cannot break out of its cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
