"""`python -m ivtp.run experiment=ablation_groupsize`: compose → rows → evaluate → record → report.

Any key of the config can be given as `key=value`, any group as `group=name`; `--help` lists them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from ivtp.command import command
from ivtp.registry import UserError

VERSIONED = ("torch", "transformers", "lightning", "timm", "open_clip_torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 0: done, 2: the request cannot be met (one line on standard error)."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("WANDB_SILENT", "true")
    return command(arguments, usage, run)


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

    console = Console(highlight=False)  # standard error is for what went wrong
    console.print(f"[bold]{config.name}[/]: {len(rows)} rows → {folder}", soft_wrap=True)

    from ivtp import build, records

    build.quiet_libraries()
    from ivtp.report import check_paper

    check_paper(config.paper, rows)
    check_claims(config, rows)
    spend(config, rows, folder, console)
    if not config.evaluate:
        return folder
    rows = [row for row in rows if not row["stand_in"]]
    device = pick_device(config)
    model, processor = build.build_model(config, device)
    shape = build.shape_of(model)
    data = build.build_data(config, processor, shape, config.trainer.batch_size)
    text, instruction = prompt_lengths(data, processor, config.model.prompt)
    planned = build.plan_rows(rows, shape, text, instruction)
    identity = {
        "model": build.model_identity(config, model),
        "data": dict(config.data) | {"hash": build.data_hash(data)},
        "prompt": config.model.prompt,
        "text_encoder": config.model.text_encoder,
        "code": records.code_version(),
    }
    results = folder / "results.jsonl"
    finished, torn = records.read(results)
    if torn:
        console.print(f"{torn} torn line(s) of {results} set aside in {results.name}.torn", soft_wrap=True)
    done = {record["key"]: record for record in finished}
    about = {"experiment": config.name, **identity, "text_tokens": text, "seed": config.seed, **machine(device)}

    from ivtp.report import report, viewer

    watch = viewer.save(folder, data.data, processor, config.viewer)
    evaluator = Evaluator(model, processor, data, config, folder, console, watch)
    current = []
    for number, row in enumerate(planned, start=1):
        asked = {k: v for k, v in asdict(row).items() if k in ("pruner", "budget", "position_ids")}
        key = records.key(asked, identity)
        record = done.get(key)
        evaluator.share(planned[number - 1 :])
        if record is None or record["label"] != row.label:
            title = f"{number}/{len(planned)} {row.label}"
            record = evaluator.evaluate(key, row, title) | about | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            records.append(results, [record])
        current.append(record)
        evaluator.log(record, current)
    about = {
        "keys": [record["key"] for record in current],
        "compare_to": config.compare_to,
        "question": question(config),
    }
    from omegaconf import OmegaConf

    about |= {key: OmegaConf.to_container(config)[key] for key in ("paper", "claims", "pictures", "overlap")}
    records.replace(folder / "experiment.json", json.dumps(about, ensure_ascii=False).encode())
    report(folder, current, config.compare_to, data.data, Console(), about["question"], about)
    return folder


def check_claims(config, rows: list[dict]) -> None:
    """Every row that is compared to, or claimed something of, exists; rows of several seeds go by their common label.
    So does the section whose overlap is asked for."""
    from ivtp.registry import UnknownName, unknown

    labels = {row["seeds_of"] or row["label"] for row in rows}
    named = [config.compare_to] if config.compare_to is not None else []
    for name in [*named, *(row for claim in config.claims for row in claim["rows"])]:
        if name not in labels:
            raise UnknownName(unknown("row to compare to", str(name), labels))
    sections = {row["section"] for row in rows}
    if config.overlap is not None and config.overlap not in sections:
        raise UnknownName(unknown("section to show the overlap of:", str(config.overlap), sections))


def spend(config, rows: list[dict], folder: Path, console) -> None:
    """The cost of the rows on the models of `costs`, from their configs alone: printed, and in costs.jsonl."""
    from omegaconf import OmegaConf

    from ivtp import records
    from ivtp.build import build_shape
    from ivtp.config import FOLDER, options
    from ivtp.cost import as_text, closed_form, tables
    from ivtp.registry import UnknownName, unknown

    found = []
    for name in (config.costs.models or []) if config.variants else []:
        if name not in options("model"):
            raise UnknownName(unknown("model", str(name), options("model")))
        shape = build_shape(OmegaConf.create({"model": OmegaConf.load(FOLDER / "model" / f"{name}.yaml")}))
        try:
            found += closed_form(name, rows, shape, config.costs.text, None)
        except UserError as error:  # a budget that only fits the model that runs
            console.print(f"no cost of {name}: {error}", soft_wrap=True, markup=False)
    records.replace(folder / "costs.jsonl", b"")
    records.append(folder / "costs.jsonl", found)
    if not config.evaluate:
        from ivtp.report.tables import markdown

        made = tables(found)
        for table in made:
            print(as_text(table))
        text = f"# {config.name}\n" + "".join(markdown(*table) for table in made)
        records.replace(folder / "table.md", text.encode())


def question(config) -> str:
    """What the experiment asks: its own `question`, else the first comment of its YAML."""
    from ivtp.config import options

    return config.get("question") or options("experiment").get(config.name, "")


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
    if device == "cuda" and not torch.cuda.is_available():
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

    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:  # no git here
        git = ""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "versions": {"ivtp": version("ivtp"), "python": platform.python_version()}
        | {package: version(package) for package in VERSIONED},
        "git": git or None,
        "machine": {"device": device, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


class Evaluator:
    """Runs rows through `Trainer.test`, keeps their per-sample outcomes in files, and logs them."""

    def __init__(self, model, processor, data, config, folder: Path, console, watch=frozenset()) -> None:
        self.model, self.processor, self.data, self.config = model, processor, data, config
        self.folder, self.console, self.watch = folder, console, watch
        from ivtp.backbones.shared import SharedVision

        self.shared = None
        if config.trainer.share_mib and not config.measure:
            self.shared = SharedVision(config.trainer.share_mib << 20)
        self.outcomes: dict[str, list[dict]] = {}

    def share(self, rows: list) -> None:
        """Keep of the vision side what this row and later ones need; a row that shares with none keeps nothing."""
        if self.shared is not None:
            from ivtp.backbones.shared import vision_side

            self.shared.keep_for([row.plan for row in rows])
            later = [vision_side(row.plan) for row in rows[1:]]
            self.shared.open = vision_side(rows[0].plan) in later

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
        from ivtp.evaluation.statistics import passing, summary

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

            watch = self.stopwatch()
            more = {"shared": self.shared} | ({"part": watch} if watch else {})
            module = Answer(
                self.model, self.processor, row.plan, record, self.config.data.max_new_tokens, self.watch, **more
            )
            hits = self.shared.hits if self.shared else 0
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
            f"{title}: {100 * accuracy['mean']:.1f}{error} %, {row.cost.total / 1e9:.4g} GFLOPs{speed}", soft_wrap=True
        )
        plan = row.plan
        return {
            "key": key,
            "label": row.label,
            "series": row.series,
            "section": row.section,
            "pruner": row.pruner,
            "budget": row.budget,
            "position_ids": row.position_ids,
            "paper": row.paper,
            "seeds_of": row.seeds_of,
            "tokens": list(row.cost.tokens),
            "average_tokens": row.cost.average_tokens,
            "cuts": {
                site: [[cut.layer, cut.keep, cut.after] for cut in pruner.schedule] if pruner else []
                for site, pruner in (("vision", plan.vision), ("language", plan.language))
            },
            "tflops": row.cost.tflops(),
            "metrics": metrics,
            "speed": {
                "questions_per_second": rate,
                "batch_size": self.config.trainer.batch_size,
                "shared": bool(self.shared and self.shared.hits > hits),
            }
            | (
                {"parts": {part: s / (len(outcomes) - before) for part, s in watch.seconds.items()}}
                if watch and rate
                else {}
            ),
            **({"counted": self.count(plan)} if self.config.measure else {}),
            **({"words": passing(outcomes, plan.tau)} if plan.reads_clip and plan.words == "te_rt" else {}),
        }

    def stopwatch(self):
        """Takes the time of each part, where the experiment measures."""
        if not self.config.measure:
            return None
        import torch

        from ivtp.evaluation.speed import Stopwatch

        return Stopwatch(torch.cuda.synchronize) if self.model.device.type == "cuda" else Stopwatch()

    def count(self, plan) -> dict:
        """FLOPs of one prefill of the first sample: as torch counts the executed ones, and in closed form."""
        from ivtp.build import shape_of
        from ivtp.evaluation.speed import count
        from ivtp.pruning.cost import cost

        batch = self.data.collate([self.data.data[0]])
        question = batch.samples[0]["question"]
        shape = shape_of(self.model)
        words = batch.inputs["input_ids"].shape[1] - shape.patches
        read = len(self.processor.tokenizer(question, add_special_tokens=False)["input_ids"]) + 2
        closed = cost(shape, plan, words, read, streamed=True)
        parts = ("vision", "projector", "text_encoder", "language", "pruner", "total")
        inputs = {name: value.to(self.model.device) for name, value in batch.inputs.items()}
        counted = count(self.model, plan, inputs, question)
        return {"counted": counted, "closed": {part: getattr(closed, part) for part in parts}}

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
