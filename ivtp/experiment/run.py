"""Run of an experiment: check the request, then evaluate its rows and report on them."""

from collections.abc import Sequence
from pathlib import Path

from ivtp import results as store
from ivtp.registry import UnknownName, unknown


def run(arguments: Sequence[str]) -> Path:
    """Evaluate every row that has no result yet, report on all, and return the folder of the results."""
    from ivtp.experiment.config import load_config, variants

    config = load_config(arguments)
    rows = list(variants(config))
    folder = Path(config.output) / config.name
    store.replace(folder / ".probe", b"")  # fails now, and not after hours, if results cannot be written there
    (folder / ".probe").unlink()

    # What follows imports transformers and Lightning: an error in the request does not wait for them.
    from ivtp.experiment.costs import write_costs
    from ivtp.experiment.planning import quiet_libraries
    from ivtp.report import paper
    from ivtp.report.console import PlainConsole

    console = PlainConsole()  # standard error is for what went wrong
    console.print(f"{config.name}: {len(rows)} rows → {folder}", soft_wrap=True)
    quiet_libraries()
    paper.check(config.paper, rows)
    check_claims(config, rows)
    write_costs(config, rows, folder, console)
    if config.evaluate:
        from ivtp.experiment.steps import evaluate

        evaluate(config, [row for row in rows if not row["stand_in"]], folder, console)
    return folder


def check_claims(config, rows: list[dict]) -> None:
    """Raise UnknownName for an unknown row to compare to, row of a claim (seeds by their common label) or section."""
    labels = {row["seeds_of"] or row["label"] for row in rows}
    named = [config.compare_to] if config.compare_to is not None else []
    for name in [*named, *(row for claim in config.claims for row in claim["rows"])]:
        if name not in labels:
            raise UnknownName(unknown("row to compare to", str(name), labels))
    sections = {row["section"] for row in rows}
    if config.overlap is not None and config.overlap not in sections:
        raise UnknownName(unknown("section to show the overlap of:", str(config.overlap), sections))
