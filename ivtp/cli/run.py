"""`python -m ivtp.run experiment=ablation_groupsize`: evaluate the rows of an experiment and report on them.

Any key of the config can be given as `key=value` or `--key=value`, any group as `group=name`; this text lists them.

  -m, --multirun        run every combination of the values: pruner=topk,ivtp budget.keep=32,64
  -cd, --config-dir DIR more configs: DIR/experiment/mine.yaml is experiment=mine, DIR/model/, DIR/data/ likewise
  -c, --cfg job         print the config and run nothing; with --resolve, its interpolations too
  -i, --info            print Hydra's search path, plugins and defaults
  --hydra-help          Hydra's own flags; hydra/launcher=joblib|submitit_local|submitit_slurm, hydra/sweeper=optuna
  -sc install=bash      shell completion: eval "$(ivtp -sc install=bash)"
"""

import sys
from collections.abc import Sequence

from ivtp.cli.command import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 done, 2 a request that cannot be met (one line on standard error)."""
    options = sys.argv[1:] if arguments is None else list(arguments)
    return command(options, lambda: usage(options), run)


def run(arguments: list[str]) -> None:
    """Run Hydra's application, whose imports take a while: a signal that arrives meanwhile is handled already."""
    from ivtp.cli.application import application

    application(arguments)


def usage(arguments: Sequence[str]) -> str:
    """List the options of every config group and all keys."""
    from pathlib import Path

    from ivtp.cli.application import read
    from ivtp.cli.usage import listing
    from ivtp.experiment.config import prepare

    request, _ = read([argument for argument in arguments if argument not in ("-h", "--help")])
    prepare(request.overrides, multirun=True)
    folders = [Path(request.config_dir)] if request.config_dir else []
    return f"{(__doc__ or '').strip()}\n\n{listing(folders)}"
