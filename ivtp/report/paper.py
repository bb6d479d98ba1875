"""Numbers of the paper, shown beside ours and marked as the paper's."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ivtp.registry import UnknownName, unknown

FILE = Path(__file__).with_name("paper.yaml")
NOTE = "† after retraining with the method, ours are training-free; ‡ modules of its own are trained: compared in cost only."


@cache
def paper() -> dict:
    """Tables and figures of the paper whose numbers are known."""
    tables: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    return tables


def table(name: str) -> dict:
    """Table or figure by name; raises UnknownName."""
    if name not in paper():
        raise UnknownName(unknown("table of the paper", name, paper()))
    return paper()[name]


def row(identity: str) -> dict:
    """Row such as "table1/IVTP": average, tflops, and drop and cost against the table's unpruned model, if known."""
    name, _, label = identity.partition("/")
    rows = table(name)["rows"]
    if label not in rows:
        raise UnknownName(unknown(f"row of the paper's {name}", label, rows))
    numbers, base = rows[label], rows[table(name)["base"]]
    known = "average" in numbers and "average" in base
    return {
        **numbers,
        "label": label + (" ‡" if numbers.get("trained") else ""),
        "drop": round(numbers["average"] - base["average"], 6) if known else None,
        "share": numbers["tflops"] / base["tflops"],
        "retrained": table(name)["retrained"],
    }


def check(names: Sequence[str], rows: Sequence[dict]) -> None:
    """Raise UnknownName for tables and rows that the paper lacks."""
    for name in names:
        table(name)
    for request in rows:
        if request.get("paper"):
            row(request["paper"])


def drop(identity: str | None) -> str | None:
    """Drop in accuracy of a row of the paper, in points; "" for a row that repeats none."""
    if identity is None:
        return ""
    numbers = row(identity)
    return None if numbers["drop"] is None else f"{numbers['drop']:+.1f}{'†' if numbers['retrained'] else ''}"


def cost(identity: str | None) -> str:
    """Cost of a row of the paper relative to its unpruned model; "" for a row that repeats none."""
    return "" if identity is None else f"{100 * row(identity)['share']:.0f} %"


def title(name: str) -> str:
    """Title of a table of the paper, marked as the paper's."""
    numbers = table(name)
    retrained = " († retrained)" if numbers["retrained"] else ""
    return f"The paper's own numbers, not ours. {numbers['title']}{retrained}"
