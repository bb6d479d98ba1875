"""`python -m ivtp.report outputs/table1`: write the report of finished results again.

It needs the folder alone: no model, no data, no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ivtp.command import command
from ivtp.registry import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    return command(arguments, lambda: __doc__, _write)


def _write(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UserError("give one folder of results, as in: python -m ivtp.report outputs/table1")
    write(Path(arguments[0]))


def write(folder: Path) -> None:
    from ivtp.console import PlainConsole
    from ivtp.report import report

    rows, about = finished(folder)
    report(folder, rows, about.get("compare_to"), None, PlainConsole(), about.get("question", ""), about)


def finished(folder: Path) -> tuple[list[dict], dict]:
    """The rows of the last run in their order, and what it said about itself; of a run that was stopped before its
    end, the last record of every label."""
    from ivtp import records

    rows, _ = records.read(folder / "results.jsonl")
    if not rows:
        raise UserError(f"{folder} has no results.jsonl with results; give the folder that a run wrote")
    about = folder / "experiment.json"
    about = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    by_key = {row["key"]: row for row in rows}
    if "keys" in about and all(key in by_key for key in about["keys"]):
        return [by_key[key] for key in about["keys"]], about
    return list({row["label"]: row for row in rows}.values()), {}


if __name__ == "__main__":
    raise SystemExit(main())
