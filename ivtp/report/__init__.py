"""What people look at: the table, the figures, the W&B runs. Everything is drawn from the records."""

from __future__ import annotations

from pathlib import Path

from ivtp import records
from ivtp.evaluation.statistics import compare
from ivtp.report.figures import accuracy_cost, kept_tokens
from ivtp.report.tables import as_markdown, print_table


def report(folder: Path, rows: list[dict], compare_to: str | None, data, console) -> None:
    """Table on the console and in table.md, accuracy_flops.png, kept_tokens.png, comparisons.json in `folder`."""
    outcomes = {row["label"]: records.read(folder / "outcomes" / f"{row['key']}.jsonl")[0] for row in rows}
    against = [rows[0]["label"]] + ([compare_to] if compare_to and compare_to != rows[0]["label"] else [])
    comparisons = {
        row["label"]: {other: compare(outcomes[row["label"]], outcomes[other]) for other in against} for row in rows
    }
    print_table(rows, comparisons, console)
    records.replace(folder / "table.md", as_markdown(rows, comparisons).encode())
    pictures = [folder / "accuracy_flops.png", folder / "kept_tokens.png"]
    accuracy_cost(rows, pictures[0])
    if not kept_tokens(rows, outcomes, data, pictures[1]):
        pictures.pop()
    console.print("Written: " + ", ".join(str(path) for path in [folder / "table.md", *pictures]), highlight=False)
