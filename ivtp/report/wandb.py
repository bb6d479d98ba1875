"""Weights & Biases: a run per row with config, summary, cost, and a table of samples with pictures of the kept tokens."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivtp.data.batches import images_of
from ivtp.data.failures import Failed, answered, failures, read
from ivtp.data.outcomes import Outcome
from ivtp.evaluation.statistics import compare, flip
from ivtp.registry import UserError, check_choice
from ivtp.report.plots import kept_patches
from ivtp.results import Result
from ivtp.text import one_line, printable

CONFIG = (
    *("experiment", "label", "series", "section", "pruner", "budget", "position_ids", "cuts", "model", "data"),
    *("prompt", "text_encoder", "seed", "seeds_of", "code", "git", "versions", "machine"),
)
"""Fields of a result that are the config of its run."""


def logged_in() -> bool:
    """True if there is a key or token of Weights & Biases; `wandb.login` before 0.26 would prompt for one."""
    import wandb

    return bool(wandb.api.is_authenticated)


MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
KEY = re.compile(r"(\w+-)?[\w-]{40,}")
"""Keys of W&B: 40 letters, digits and underscores or more, behind the prefix of a server of one's own."""


def mode() -> Any:
    """Mode of the client: WANDB_MODE, else "online" with a login and "offline" without."""
    return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")


def in_sweep() -> bool:
    """True in a process of `wandb agent`, which names the one run that it waits for."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def check(logger, folder: Path) -> None:
    """Refuse settings of Weights & Biases that fail on the first row; no server is asked."""
    import wandb

    try:
        check_choice("WANDB_MODE", mode(), MODES)
    except ValueError as error:
        raise UserError(str(error)) from error
    if mode() == "disabled":
        return
    try:
        wandb.Settings(project=logger.project)
    except (ValueError, wandb.Error) as error:
        reason = next((line.strip() for line in str(error).splitlines() if "project name" in line), str(error))
        raise UserError(f"logger.project={logger.project}: {one_line(reason)}") from error
    place = run_folder(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"WANDB_DIR={place} cannot be written: {error.strerror}") from error
    if mode() not in ("offline", "dryrun") and not KEY.fullmatch(str(wandb.api.api_key or "")):
        problem = (
            "the key of Weights & Biases is malformed" if wandb.api.api_key else "no key of Weights & Biases is known"
        )
        raise UserError(f"{problem}; run `wandb login`, set WANDB_API_KEY, or log offline with WANDB_MODE=offline")


def run_folder(folder: Path) -> Path:
    """Folder of the client's files: WANDB_DIR, else that of the run."""
    return Path(os.environ.get("WANDB_DIR") or folder)


@contextmanager
def staging(folder: Path) -> Iterator[None]:
    """Stage pictures of tables, until they are synced, beside the run; not in the home folder."""
    names = [name for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if name not in os.environ]
    os.environ |= dict.fromkeys(names, str((folder / "wandb").resolve()))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def log_row(logger, folder: Path, result: Result, outcomes: list[Outcome], unpruned: list[Outcome], data) -> None:
    """Log a finished row; everything that the client writes goes below `folder`, or WANDB_DIR."""
    import wandb

    try:
        with staging(run_folder(folder)):
            _log_row(logger, folder, result, outcomes, unpruned, data)
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases: {one_line(str(error))}; the results are in {folder}, and the same command logs them "
            "(WANDB_MODE=offline, logger=none)"
        ) from error


def _log_row(logger, folder: Path, result: Result, outcomes: list[Outcome], unpruned: list[Outcome], data) -> None:
    import wandb

    lost, outcomes, unpruned = failures(outcomes), answered(outcomes), answered(unpruned)
    label, tags = one_line(result.label), os.environ.get("WANDB_TAGS", "").split(",")
    # An agent has given project, entity and id already.
    own = {"project": logger.project, "entity": logger.entity, "id": f"{result.experiment}-{result.key}"[:64]}
    run = wandb.init(
        **({} if in_sweep() else own),
        group=os.environ.get("WANDB_RUN_GROUP") or result.experiment,
        name=f"{os.environ['WANDB_NAME']}: {label}" if os.environ.get("WANDB_NAME") else label,
        tags=[tag for tag in [result.pruner["name"], result.section, *map(str.strip, tags)] if tag],
        config={name: getattr(result, name) for name in CONFIG},
        dir=str(run_folder(folder)),
        mode=mode(),
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, save_code=False, disable_git=True),
    )
    rows, flips, pictures = tables(result, outcomes, unpruned, data, logger.samples)
    values = summary(result) | scalars("unpruned", compare(outcomes, unpruned))
    run.log(
        {
            **{name: value for name, value in values.items() if value is not None},
            "samples": rows,
            "flips": flips,
            "cost": cost_table(result),
            **({"failed": len(lost), "failures": failed_table(lost)} if lost else {}),
            **({"kept_tokens": pictures} if pictures else {}),
        }
    )
    run.finish()


def summary(result: Result) -> dict:
    """Numbers of a row: metrics with their standard errors (NAME/se), FLOPs per part, tokens, throughput."""
    metrics = {name: metric for name, metric in result.metrics.items() if isinstance(metric, dict)}
    return {
        **{name: metric["mean"] for name, metric in metrics.items()},
        **{f"{name}/se": metric["se"] for name, metric in metrics.items()},
        **{f"tflops/{part}": value for part, value in result.tflops.items()},
        "tokens": result.tokens[-1],
        "average_tokens": result.average_tokens,
        "gflops": result.tflops["total"] * 1e3,
        "questions_per_second": result.speed["questions_per_second"],
    }


def scalars(prefix: str, comparison: dict) -> dict:
    """Numbers of a paired comparison: intervals as low and high, flips as counts."""
    values = {}
    for name, value in comparison.items():
        if isinstance(value, dict):
            values |= {f"{prefix}/{name}/{kind}": len(ids) for kind, ids in value.items()}
        elif isinstance(value, (list, tuple)):
            values |= {f"{prefix}/{name}/{end}": x for end, x in zip(("low", "high"), value, strict=True)}
        else:
            values[f"{prefix}/{name}"] = value
    return values


def failed_table(lost: list[Outcome]):
    """Table of samples without a result, with their reasons."""
    import wandb

    columns = ["id", "family", "question", "cause", "failed"]
    return wandb.Table(columns=columns, data=[[printable(outcome[name]) for name in columns] for outcome in lost])


def cost_table(result: Result):
    """Points of the accuracy–cost plot: the row's accuracy against every part of its cost."""
    import wandb

    mean, error = (result.metrics["accuracy"][name] for name in ("mean", "se"))
    rows = [[one_line(result.label), part, value, mean, error] for part, value in result.tflops.items()]
    return wandb.Table(columns=["label", "part", "tflops", "accuracy", "se"], data=rows)


def tables(result: Result, outcomes: list[Outcome], unpruned: list[Outcome], data, pictures: int):
    """Table of answers with pictures of the first samples' kept tokens, table of flipped answers, and these pictures."""
    import wandb

    before = {outcome["id"]: outcome for outcome in unpruned}
    fields = ["id", "family", "question", "answer", "prediction", "correct"]
    rows = wandb.Table(columns=[*fields, "unpruned", "flipped", "early", "kept"])
    flips = wandb.Table(columns=[*fields, "unpruned", "unpruned_correct", "flip"])
    whole = all(isinstance(o["correct"], bool) for o in [*outcomes, *unpruned])  # a column has one type
    first = [read(data.data, i) for i in range(min(pictures, len(data.data)))] if result.drawable else []
    samples = {sample["id"]: sample for sample in first if not isinstance(sample, Failed)}
    images = []
    for outcome in outcomes:
        picture = None
        sample = samples.get(outcome["id"])
        if sample is not None and outcome["kept"] is not None and len(images_of(sample)) == 1:
            image = kept_patches(data.collate.processor.image_processor, sample, outcome, result.tokens[0])
            picture = wandb.Image(image, caption=one_line(f"{outcome['question']} {outcome['prediction']}"))
            images.append(picture)
        other = before.get(outcome["id"], outcome)
        scores = [o["correct"] if whole or o["correct"] is None else float(o["correct"]) for o in (outcome, other)]
        cells = [*(printable(outcome[name]) for name in fields[:-1]), scores[0]]
        flipped = other["prediction"] != outcome["prediction"]
        answer, early = printable(other["prediction"]), outcome["early"] and printable(outcome["early"])
        rows.add_data(*cells, answer, flipped, early, picture)
        if flipped:
            flips.add_data(*cells, answer, scores[1], flip(outcome, other))
    return rows, flips, images
