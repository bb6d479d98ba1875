"""`python -m ivtp.run experiment=ablation_groupsize`: compose → rows → evaluate → record → report.

Any key of the config can be given as `key=value`, any group as `group=name`; `--help` lists them.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from ivtp.registry import UserError

VERSIONED = ("torch", "transformers", "lightning", "timm", "open_clip_torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 0: done, 2: the request cannot be met (one line on standard error)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        if any(a in ("-h", "--help") for a in arguments):
            print(usage())
            return 0
        run(arguments)
    except UserError as error:
        print(f"ivtp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ivtp: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def usage() -> str:
    from ivtp.config import GROUPS, options

    lines = [__doc__.strip(), ""]
    for group in GROUPS:
        lines.append(f"{group}=")
        lines += [f"  {name:20} {about}" for name, about in options(group).items()]
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> Path:
    """Evaluate every row that has no result yet, then report on all; returns the folder of the results."""
    from ivtp.config import load_config, variants

    config = load_config(arguments)
    rows = list(variants(config))
    folder = Path(config.output) / config.name
    records_probe(folder)

    from rich.console import Console

    console = Console(stderr=True)
    console.print(f"[bold]{config.name}[/]: {len(rows)} rows → {folder}", highlight=False)

    from ivtp import build, records

    build.quiet_libraries()
    device = pick_device(config)
    model, processor = build.build_model(config, device)
    shape = build.shape_of(model)
    data = build.build_data(config, processor, shape, config.trainer.batch_size)
    text, instruction = prompt_lengths(data, processor, config.model.prompt)
    planned = build.plan_rows(rows, shape, text, instruction)
    if config.compare_to is not None and config.compare_to not in {row.label for row in planned}:
        from ivtp.registry import UnknownName, unknown

        raise UnknownName(unknown("row to compare to", config.compare_to, [row.label for row in planned]))

    identity = {
        "model": build.model_identity(config, model),
        "data": dict(config.data),
        "prompt": config.model.prompt,
        "text_encoder": config.model.text_encoder,
        "code": records.code_version(),
    }
    results = folder / "results.jsonl"
    finished, torn = records.read(results)
    if torn:
        console.print(f"{torn} torn line(s) of {results} set aside in {results.name}.torn")
    done = {record["key"]: record for record in finished}
    about = {"experiment": config.name, **identity, "text_tokens": text, "seed": config.seed, **machine(device)}

    evaluator = Evaluator(model, processor, data, config, folder, console)
    current = []
    for number, row in enumerate(planned, start=1):
        asked = {k: v for k, v in asdict(row).items() if k not in ("plan", "cost", "label", "section")}
        key = records.key(asked, identity)
        record = done.get(key)
        if record is None or record["label"] != row.label:
            title = f"{number}/{len(planned)} {row.label}"
            record = evaluator.evaluate(key, row, title) | about | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            records.append(results, [record])
        current.append(record)
        evaluator.log(record, current)
    from ivtp.report import report

    report(folder, current, config.compare_to, data.data, Console())
    return folder


def records_probe(folder: Path) -> None:
    """Fail before any work if nothing can be written where the results go."""
    from ivtp import records

    records.replace(folder / ".probe", b"")
    (folder / ".probe").unlink()


def pick_device(config) -> str:
    import torch

    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    device = config.trainer.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.device={device}, but torch sees no CUDA device here; use trainer.device=cpu")
    return device


def prompt_lengths(data, processor, prompt: str) -> tuple[int, int]:
    """Mean tokens of a prompt without its image, and of an instruction with the text encoder's two marks."""
    questions = [sample["question"] for sample in data.samples()]
    texts = [prompt.replace("{question}", question) for question in questions]
    around = [len(ids) - 1 for ids in processor.tokenizer(texts)["input_ids"]]
    alone = [len(ids) + 2 for ids in processor.tokenizer(questions, add_special_tokens=False)["input_ids"]]
    return round(sum(around) / len(around)), round(sum(alone) / len(alone))


def machine(device: str) -> dict:
    """Where and with what the results were made."""
    import torch

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "versions": {"ivtp": version("ivtp"), "python": platform.python_version()}
        | {package: version(package) for package in VERSIONED},
        "git": git.stdout.strip() or None,
        "machine": {"device": device, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


class Evaluator:
    """Runs rows through `Trainer.test`, keeps their per-sample outcomes in files, and logs them."""

    def __init__(self, model, processor, data, config, folder: Path, console) -> None:
        self.model, self.processor, self.data, self.config = model, processor, data, config
        self.folder, self.console = folder, console
        self.outcomes: dict[str, list[dict]] = {}

    def outcome_file(self, key: str) -> Path:
        return self.folder / "outcomes" / f"{key}.jsonl"

    def read(self, key: str) -> list[dict]:
        from ivtp import records

        if key not in self.outcomes:
            self.outcomes[key] = records.read(self.outcome_file(key))[0]
        return self.outcomes[key]

    def evaluate(self, key: str, row, title: str) -> dict:
        """The record of one row; goes on after the samples that an earlier, stopped run has answered."""
        from lightning import Trainer
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from ivtp import records
        from ivtp.evaluation.answer import Answer
        from ivtp.evaluation.statistics import summary

        path = self.outcome_file(key)
        outcomes = self.read(key)
        self.data.done = {outcome["id"] for outcome in outcomes}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            task = progress.add_task(title, total=len(self.data.data), completed=len(outcomes))

            def record(new: list[dict]) -> None:
                records.append(path, new)
                outcomes.extend(new)
                progress.update(task, completed=len(outcomes))

            module = Answer(self.model, self.processor, row.plan, record, self.config.data.max_new_tokens)
            before = len(outcomes)
            if before < len(self.data.data):
                accelerator = "cpu" if self.model.device.type == "cpu" else "gpu"
                trainer = Trainer(
                    accelerator=accelerator,
                    devices=1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                trainer.test(module, datamodule=self.data, verbose=False)
        metrics = summary(outcomes)
        rate = (len(outcomes) - before) / module.seconds if module.seconds else None
        accuracy = metrics["accuracy"]
        error = "" if accuracy["se"] != accuracy["se"] else f" ± {100 * accuracy['se']:.1f}"
        speed = f", {rate:.0f} questions/s" if rate else ""
        self.console.print(
            f"{title}: {100 * accuracy['mean']:.1f}{error} %, {row.cost.total / 1e9:.4g} GFLOPs{speed}", highlight=False
        )
        plan = row.plan
        return {
            "key": key,
            "label": row.label,
            "section": row.section,
            "pruner": row.pruner,
            "budget": row.budget,
            "position_ids": row.position_ids,
            "tokens": list(row.cost.tokens),
            "cuts": {
                site: [[cut.layer, cut.keep, cut.after] for cut in pruner.schedule] if pruner else []
                for site, pruner in (("vision", plan.vision), ("language", plan.language))
            },
            "tflops": row.cost.tflops(),
            "metrics": metrics,
            "speed": {"questions_per_second": rate, "batch_size": self.config.trainer.batch_size},
        }

    def log(self, record: dict, current: list[dict]) -> None:
        """One W&B run per row; what was logged once is not logged again by a run that goes on."""
        if self.config.logger.name == "none":
            return
        marker = self.folder / "wandb-logged" / record["key"]
        if marker.exists():
            return
        from ivtp import records
        from ivtp.report.wandb_run import log_row

        log_row(self.config, self.folder, record, self.read(record["key"]), self.read(current[0]["key"]), self.data)
        records.replace(marker, b"")


if __name__ == "__main__":
    raise SystemExit(main())
