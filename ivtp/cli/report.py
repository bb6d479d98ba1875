"""`python -m ivtp.report outputs/table1`: write the report of finished results again.

`python -m ivtp.report A B … output=FOLDER`: one report over several runs, written to FOLDER (default: outputs/merged). Rows
are compared on the same questions, so that the runs must agree in model, data and prompt.

  compare_to=LABEL  the row that all others are tested against, besides the unpruned model (default: the run's own; of
                    several runs the first pruned row)

Only the folders are needed: no model, no data, no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ivtp.cli.arguments import parse
from ivtp.cli.command import command
from ivtp.registry import UnknownName, UserError, unknown


@dataclass(frozen=True)
class Arguments:
    """Arguments beside the folders."""

    output: str = "outputs/merged"
    compare_to: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return command(arguments, lambda: __doc__ or "", _write)


def _write(arguments: list[str]) -> None:
    folders = [Path(argument) for argument in arguments if "=" not in argument or Path(argument).is_dir()]
    options = parse(Arguments, [argument for argument in arguments if Path(argument) not in folders])
    if not folders:
        raise UserError("give folders of results, as in: python -m ivtp.report outputs/table1")
    from ivtp.report import report
    from ivtp.report.console import PlainConsole
    from ivtp.report.merge import check_alike, labelled, merge, sources
    from ivtp.results import only_writer

    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    some = sources((folder, {"": name}) for folder, name in zip(folders, names, strict=True))
    check_alike(some)
    labels = {result.seeds_of or result.label for _, result in labelled(some)}
    if options.compare_to not in (None, *labels):
        raise UnknownName(unknown("row to compare to", str(options.compare_to), labels))
    if len(some) > 1:
        if any(folder.resolve() == Path(options.output).resolve() for folder in folders):
            raise UserError(f"output={options.output} is one of the folders that are merged; choose another")
        merge(some, Path(options.output), PlainConsole(), options.compare_to)
    else:
        given = {} if options.compare_to is None else {"compare_to": options.compare_to}
        with only_writer(folders[0]):
            report(folders[0], some[0].results, PlainConsole(), some[0].about | given)
