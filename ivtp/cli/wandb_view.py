"""`python -m ivtp.report.wandb_view ENTITY/PROJECT`: save the view of the runs in Weights & Biases.

Runs are grouped by experiment, then by row; accuracy against cost, a bar per row and family, what flipped, tables with
images of the kept tokens. `--experiment NAME` shows one experiment alone. Needs `pip install 'ivtp[workspaces]'` and
a login (`wandb login`). Run it once per project: later runs appear in the view.
"""

from collections.abc import Sequence

from ivtp.cli.command import command
from ivtp.registry import UserError
from ivtp.report.wandb_view import save, workspace


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return command(arguments, lambda: __doc__ or "", lambda options: print(save(workspace(*parse(options)))))


def parse(arguments: Sequence[str]) -> tuple[str, str, str | None]:
    """Read entity, project and experiment."""
    rest, experiment = list(arguments), None
    if "--experiment" in rest:
        index = rest.index("--experiment")
        experiment = next(iter(rest[index + 1 : index + 2]), None)
        del rest[index : index + 2]
        if not experiment:
            raise UserError("--experiment needs the name of an experiment, as in: --experiment table1")
    parts = rest[0].split("/") if len(rest) == 1 else []
    if len(parts) != 2 or not all(parts):
        raise UserError(f"{' '.join(rest)!r} is not of the form ENTITY/PROJECT, as in: my-team/ivtp")
    return parts[0], parts[1], experiment
