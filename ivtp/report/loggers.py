"""Loggers of a run: a run of Weights & Biases, Lightning's CSV files and its TensorBoard files, for each row."""

import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ivtp import results as store
from ivtp.data.failures import answered
from ivtp.data.outcomes import Outcome
from ivtp.evaluation.statistics import compare
from ivtp.registry import UserError
from ivtp.report import wandb
from ivtp.results import Result

FILES = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}


def check(logger, folder: Path) -> None:
    """Refuse what would fail on the first row: a package, a key, a name or a mode."""
    if logger.tensorboard and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise UserError("logger=tensorboard needs tensorboard: pip install tensorboard")
    if logger.wandb:
        wandb.check(logger, folder)


def unlogged(folder: Path, result: Result) -> None:
    """Forget that a row was logged: its result is new."""
    for name in ("wandb", *FILES):
        _marker(folder, name, result).unlink(missing_ok=True)


def log(logger, folder: Path, result: Result, read: Callable[[Result], list[Outcome]], first: Result, data) -> None:
    """Log a row by every logger, compared with the first row, unless an earlier run did."""
    for name, kind in FILES.items():
        marker = _marker(folder, name, result)
        if logger[name] and not marker.exists():
            shutil.rmtree(marker.parent, ignore_errors=True)  # what a run that was stopped here has left
            _log_files(kind(str(folder), name=name, version=version(result)), result, read(result), read(first))
            store.replace(marker, b"")
    marker = _marker(folder, "wandb", result)
    if logger.wandb and wandb.mode() != "disabled" and not marker.exists():
        wandb.log_row(logger, folder, result, read(result), read(first), data)
        store.replace(marker, b"")


def version(result: Result) -> str:
    """Name of a row's folder: its label as text for any file system, and the start of its key."""
    return f"{re.sub(r'[^A-Za-z0-9_.=,+-]+', '_', result.label)[:80]}-{result.key[:8]}"


def _marker(folder: Path, name: str, result: Result) -> Path:
    """File that says that a logger has all of a row."""
    return folder / "wandb-logged" / result.key if name == "wandb" else folder / name / version(result) / "logged"


def _log_files(
    logger: CSVLogger | TensorBoardLogger, result: Result, ours: list[Outcome], first: list[Outcome]
) -> None:
    numbers = wandb.summary(result) | wandb.scalars("unpruned", compare(answered(ours), answered(first)))
    logger.log_hyperparams({name: getattr(result, name) for name in wandb.CONFIG})
    logger.log_metrics(
        {name: float(value) for name, value in numbers.items() if isinstance(value, (int, float))}, step=0
    )
    logger.finalize("success")
