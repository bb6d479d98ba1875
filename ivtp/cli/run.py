"""`python -m ivtp.run experiment=ablation_groupsize`: evaluate the rows of an experiment and report on them.

Any key of the config can be given as `key=value`, any group as `group=name`; `--help` lists them.
"""

import os
from collections.abc import Sequence

from ivtp.cli.command import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 2 a request that cannot be met (one line on standard error)."""
    os.environ.setdefault("WANDB_SILENT", "true")
    from ivtp.experiment.run import run

    return command(arguments, usage, run)


def usage() -> str:
    """List the options of every config group."""
    from ivtp.experiment.config import GROUPS, options

    lines = [(__doc__ or "").strip(), ""]
    for group in GROUPS:
        lines.append(f"{group}=")
        lines += [f"  {name:20} {about}" for name, about in options(group).items()]
    return "\n".join(lines)
