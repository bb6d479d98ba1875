"""One Weights & Biases run per row: config, summary, cost, per-sample table with pictures of the kept tokens."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ivtp.data.batches import pictures as images_of
from ivtp.data.failures import Failed, answered, failures, read
from ivtp.evaluation.statistics import compare
from ivtp.report.figures import overlay
from ivtp.report.viewer import as_seen
from ivtp.text import one_line, printable

CONFIG = (
    *("experiment", "label", "series", "section", "pruner", "budget", "position_ids", "cuts", "model", "data"),
    *("prompt", "text_encoder", "seed", "seeds_of", "code", "git", "versions", "machine"),
)
"""What of a record is a run's config: all that it depends on."""


def logged_in() -> bool:
    """Whether a key or token of Weights & Biases is found. (`wandb.login` would ask for one before its version 0.26.)"""
    import wandb

    return bool(wandb.api.is_authenticated)


def mode() -> str:
    """ "online" where someone is logged in, unless WANDB_MODE says otherwise; else "offline"."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if logged_in() else "offline"


def log_row(config, folder: Path, record: dict, outcomes: list[dict], unpruned: list[dict], data) -> None:
    """Log a finished row; everything that the client writes goes below `folder`."""
    lost, outcomes, unpruned = failures(outcomes), answered(outcomes), answered(unpruned)
    # The pictures inside a table are staged in these folders until they are synced.
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").resolve()))
    os.environ.setdefault("WANDB_CACHE_DIR", str((folder / "wandb").resolve()))
    import wandb

    run = wandb.init(
        project=config.logger.project,
        entity=config.logger.entity,
        group=record["experiment"],
        name=one_line(record["label"]),
        id=f"{record['experiment']}-{record['key']}"[:64],
        tags=[record["pruner"]["name"], *([record["section"]] if record["section"] else [])],
        config={k: record[k] for k in CONFIG if k in record},
        dir=str(folder),
        mode=mode(),
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, save_code=False, disable_git=True),
    )
    metrics = {name: value["mean"] for name, value in record["metrics"].items() if isinstance(value, dict)}
    errors = {f"{name}/se": value["se"] for name, value in record["metrics"].items() if isinstance(value, dict)}
    cost = {f"tflops/{part}": value for part, value in record["tflops"].items()}
    against = scalars("unpruned", compare(outcomes, unpruned))
    spent = {
        "tokens": record["tokens"][-1],
        "average_tokens": record.get("average_tokens"),
        "gflops": record["tflops"]["total"] * 1e3,
        "questions_per_second": record["speed"]["questions_per_second"],
    }
    rows, flips, pictures = tables(record, outcomes, unpruned, data, config.logger.samples)
    numbers = {**metrics, **errors, **cost, **against, **spent}
    run.log(
        {
            **{k: v for k, v in numbers.items() if v is not None},
            "samples": rows,
            "flips": flips,
            "cost": cost_table(record),
            **({"failed": len(lost), "failures": failed_table(lost)} if lost else {}),
            **({"kept_tokens": pictures} if pictures else {}),
        }
    )
    run.finish()


def scalars(prefix: str, comparison: dict) -> dict:
    """A paired comparison as single numbers: intervals as low and high, flips as counts."""
    found = {}
    for name, value in comparison.items():
        if isinstance(value, dict):
            found |= {f"{prefix}/{name}/{kind}": len(ids) for kind, ids in value.items()}
        elif isinstance(value, (list, tuple)):
            found |= {f"{prefix}/{name}/{end}": x for end, x in zip(("low", "high"), value, strict=True)}
        else:
            found[f"{prefix}/{name}"] = value
    return found


def failed_table(lost: list[dict]):
    """The samples without a result, and why."""
    import wandb

    columns = ["id", "family", "question", "cause", "failed"]
    return wandb.Table(columns=columns, data=[[printable(outcome[name]) for name in columns] for outcome in lost])


def cost_table(record: dict):
    """The row as points of the accuracy–cost plot: its accuracy against every part of its cost."""
    import wandb

    mean, error = (record["metrics"]["accuracy"][name] for name in ("mean", "se"))
    rows = [[one_line(record["label"]), part, value, mean, error] for part, value in record["tflops"].items()]
    return wandb.Table(columns=["label", "part", "tflops", "accuracy", "se"], data=rows)


def tables(record: dict, outcomes: list[dict], unpruned: list[dict], data, pictures: int):
    """Every sample's answer with pictures of what was kept of the first ones, the samples whose answer flipped, and
    those pictures again on their own."""
    import wandb

    before = {outcome["id"]: outcome for outcome in unpruned}
    columns = ["id", "family", "question", "answer", "prediction", "correct"]
    rows = wandb.Table(columns=[*columns, "unpruned", "flipped", "early", "kept"])
    flips = wandb.Table(columns=[*columns, "unpruned", "unpruned_correct", "flip"])
    images, grid = [], record.get("drawable", True)
    whole = all(isinstance(o["correct"], bool) for o in [*outcomes, *unpruned])  # a column has one type
    first = [read(data.data, i) for i in range(min(pictures, len(data.data)))]
    samples = {sample["id"]: sample for sample in first if not isinstance(sample, Failed)}
    for outcome in outcomes:
        picture = None
        sample = samples.get(outcome["id"])
        if sample is not None and outcome["kept"] is not None and len(images_of(sample)) == 1 and grid:
            image = as_seen(data.collate.processor.image_processor, *images_of(sample))
            shown = np.asarray(image), outcome["kept"], record["tokens"][0], sample["patches"].numpy()
            picture = wandb.Image(overlay(*shown), caption=one_line(f"{outcome['question']} {outcome['prediction']}"))
            images.append(picture)
        other = before.get(outcome["id"], outcome)
        worth = [o["correct"] if whole or o["correct"] is None else float(o["correct"]) for o in (outcome, other)]
        fields = [*(printable(outcome[name]) for name in columns[:-1]), worth[0]]
        flipped = other["prediction"] != outcome["prediction"]
        said, early = printable(other["prediction"]), outcome["early"] and printable(outcome["early"])
        rows.add_data(*fields, said, flipped, early, picture)
        if flipped:
            flips.add_data(*fields, said, worth[1], flip(outcome, other))
    return rows, flips, images


def flip(outcome: dict, other: dict) -> str:
    """What a flipped answer did: "gained" a right one, "lost" one, or "changed" one wrong answer for another."""
    if outcome["correct"] == other["correct"]:
        return "changed"
    return "gained" if outcome["correct"] else "lost"
