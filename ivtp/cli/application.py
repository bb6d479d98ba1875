"""Hydra's application: composition, jobs of a multirun, and the report over them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ivtp.experiment import config as configs
from ivtp.experiment import multirun
from ivtp.registry import UserError, unknown


def application(arguments: list[str]) -> None:
    """Hydra's application on these arguments."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised, and told by `command`
    request, flags = read(arguments)
    folders = [Path(request.config_dir)] if request.config_dir else []
    overrides = configs.prepare(request.overrides, request.multirun or "hydra.mode=MULTIRUN" in request.overrides)
    sweep = uuid4().hex
    runs = not (request.cfg or request.info or request.shell_completion or request.hydra_help)
    mark = [f"++hydra.job.env_set.{multirun.SWEEP}={sweep}"] if runs else []
    before, sys.argv = sys.argv, [sys.argv[0], *flags, *overrides, *mark]
    failures.clear()
    multirun.Sweep.folders.clear()
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        raise configs.readable(error, overrides, folders) from error
    except SystemExit as end:  # Hydra ends so after --hydra-help and the like
        if end.code:
            raise
    except Exception as error:
        if not multirun.Sweep.folders:
            raise
        failures.append(error)
    finally:
        sys.argv = before
    for folder in multirun.Sweep.folders:  # raises for jobs that failed
        multirun.report(folder, sweep)
    if failures:
        raise failures[0]


failures: list[Exception] = []
"""Error of a run: Hydra would put a line of its own before one that a single job raises."""


@hydra.main(config_path=str(configs.FOLDER.resolve()), config_name="config", version_base="1.3")
def job(config: DictConfig) -> object:
    """Evaluate one composed config; a multirun calls it for each of its jobs, maybe in another process."""
    about = HydraConfig.get()
    folder = Path(about.runtime.output_dir)
    if about.mode == RunMode.MULTIRUN:
        return multirun.evaluate(config, folder)
    try:
        from ivtp.experiment.run import run

        run(configs.finish(config, about.overrides.task, configs.own_folders()), folder)
    except Exception as error:
        failures.append(error)
    return None


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read Hydra's flags: what they say, with `overrides` from anywhere between them, and the flags alone.

    --key=value becomes key=value, as agents of sweeps write it.
    """
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    request, unread = parser.parse_known_args(arguments)
    for argument in unread:
        if argument.startswith("-") and "=" not in argument:
            known = [flag for action in parser._actions for flag in action.option_strings]
            raise UserError(f"{unknown('flag', argument, known)}; a key is given as key=value")
    if request.experimental_rerun:
        raise UserError("--experimental-rerun opens a pickle, which is never done here; give the overrides again")
    overrides = {*request.overrides, *unread}
    request.overrides = [argument.lstrip("-") for argument in arguments if argument in overrides]
    return request, [argument for argument in arguments if argument not in overrides]


def refuse(message: str) -> NoReturn:
    """Refuse arguments in one line, in place of argparse's usage."""
    raise UserError(f"{message}; --help lists keys and flags")
