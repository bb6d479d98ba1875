"""`python -m ivtp.report outputs/table1`: write the report of finished results again.

Only the folder is needed: no model, no data, no network.
"""

from collections.abc import Sequence
from pathlib import Path

from ivtp.cli.command import command
from ivtp.registry import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return command(arguments, lambda: __doc__ or "", _write)


def _write(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UserError("give one folder of results, as in: python -m ivtp.report outputs/table1")
    from ivtp.report import report
    from ivtp.report.console import PlainConsole
    from ivtp.results import finished

    results, about = finished(Path(arguments[0]))
    report(Path(arguments[0]), results, PlainConsole(), about)
