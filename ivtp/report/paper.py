"""The paper's own numbers, shown beside ours and marked as the paper's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from ivtp.registry import UnknownName, unknown

FILE = Path(__file__).with_name("paper.yaml")


@cache
def paper() -> dict:
    """Every table and figure of the paper that numbers are known of."""
    return OmegaConf.to_container(OmegaConf.load(FILE))


def table(name: str) -> dict:
    if name not in paper():
        raise UnknownName(unknown("table of the paper", name, paper()))
    return paper()[name]


def row(identity: str) -> dict:
    """The row "table1/IVTP": average, tflops, and drop against the table's unpruned model, as far as they are known."""
    name, _, label = identity.partition("/")
    rows = table(name)["rows"]
    if label not in rows:
        raise UnknownName(unknown(f"row of the paper's {name}", label, rows))
    found, base = rows[label], rows[table(name)["base"]]
    known = "average" in found and "average" in base
    return {
        **found,
        "drop": round(found["average"] - base["average"], 6) if known else None,
        "share": found["tflops"] / base["tflops"],
        "retrained": table(name)["retrained"],
    }


def cells(identity: str | None) -> list[str]:
    """What a row of ours shows of its model in the paper: drop in accuracy, share of the cost."""
    if identity is None:
        return ["", ""]
    found = row(identity)
    drop = "–" if found["drop"] is None else f"{found['drop']:+.1f}{'†' if found['retrained'] else ''}"
    return [drop, f"{100 * found['share']:.0f} %"]


def lines(name: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of one table of the paper: what is trained with modules of its own is marked with ‡."""
    found = table(name)
    columns = found.get("columns", [])
    heads = ["", "TFLOPs", "of unpruned", *columns, "average", "drop"]
    body = []
    for label, cell in found["rows"].items():
        about = row(f"{name}/{label}")
        scores = [f"{score:.1f}" for score in cell.get("scores", [])] or ["–"] * len(columns)
        average = f"{cell['average']:.1f}" if "average" in cell else "–"
        drop = "–" if about["drop"] is None else f"{about['drop']:+.1f}"
        mark = " ‡" if cell.get("trained") else ""
        body.append([label + mark, f"{cell['tflops']:g}", f"{100 * about['share']:.1f} %", *scores, average, drop])
    return heads, body


def title(name: str) -> str:
    found = table(name)
    return f"The paper's own numbers, not ours. {found['title']}" + (" († retrained)" if found["retrained"] else "")


NOTE = "† after retraining with the method, ours are training-free; ‡ modules of its own are trained: compared in cost only."
