"""One Weights & Biases run per row: config, summary, cost, per-sample table with pictures of the kept tokens."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ivtp.evaluation.statistics import compare
from ivtp.report.figures import overlay


def mode() -> str:
    """"online" where someone is logged in, unless WANDB_MODE says otherwise; else "offline"."""
    import wandb

    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if wandb.login(prompt=False) else "offline"


def log_row(config, folder: Path, record: dict, outcomes: list[dict], unpruned: list[dict], data) -> None:
    """Log a finished row; everything that the client writes goes below `folder`."""
    # The pictures inside a table are staged in these folders until they are synced.
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").resolve()))
    os.environ.setdefault("WANDB_CACHE_DIR", str((folder / "wandb").resolve()))
    import wandb

    run = wandb.init(
        project=config.logger.project,
        entity=config.logger.entity,
        group=record["experiment"],
        name=record["label"],
        id=f"{record['experiment']}-{record['key']}"[:64],
        tags=[record["pruner"]["name"], *([record["section"]] if record["section"] else [])],
        config={k: record[k] for k in ("pruner", "budget", "position_ids", "cuts", "model", "data", "seed", "versions")},
        dir=str(folder),
        mode=mode(),
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, save_code=False, disable_git=True),
    )
    summary = {name: value["mean"] for name, value in record["metrics"].items() if isinstance(value, dict)}
    errors = {f"{name}/se": value["se"] for name, value in record["metrics"].items() if isinstance(value, dict)}
    cost = {f"tflops/{part}": value for part, value in record["tflops"].items()}
    against = {f"unpruned/{k}": v for k, v in compare(outcomes, unpruned).items()}
    rows, pictures = table(record, outcomes, unpruned, data, config.logger.samples)
    run.log(
        {
            **{k: v for k, v in {**summary, **errors, **cost, **against}.items() if v is not None},
            "tokens": record["tokens"][-1],
            "questions_per_second": record["speed"]["questions_per_second"],
            "samples": rows,
            **({"kept_tokens": pictures} if pictures else {}),
        }
    )
    run.finish()


def table(record: dict, outcomes: list[dict], unpruned: list[dict], data, pictures: int):
    """Every sample's answer and whether it flipped, and pictures of what was kept of the first ones."""
    import wandb

    before = {outcome["id"]: outcome for outcome in unpruned}
    columns = ["id", "family", "question", "answer", "prediction", "correct", "unpruned", "flipped", "early"]
    rows = wandb.Table(columns=[*columns, "kept"])
    images = []
    samples = {data.data[i]["id"]: data.data[i] for i in range(min(pictures, len(data.data)))}
    for outcome in outcomes:
        picture = None
        if outcome["id"] in samples and outcome["kept"] is not None:
            sample = samples[outcome["id"]]
            shown = np.asarray(sample["image"]), outcome["kept"], record["tokens"][0], sample["patches"].numpy()
            picture = wandb.Image(overlay(*shown), caption=f"{outcome['question']} {outcome['prediction']}")
            images.append(picture)
        other = before.get(outcome["id"], outcome)["prediction"]
        fields = [outcome[name] for name in columns[:6]]
        rows.add_data(*fields, other, other != outcome["prediction"], outcome["early"], picture)
    return rows, images
