"""Carries out the rows of a run: `Trainer.test`, outcomes on disk as they come, records, Weights & Biases."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningModule, Trainer

from ivtp import records
from ivtp.backbones.shared import SharedVision, vision_side
from ivtp.build import is_encoder, shape_of
from ivtp.evaluation.answer import Answer
from ivtp.evaluation.benchmarks import headline, measured
from ivtp.evaluation.classify import Classify
from ivtp.evaluation.memory import halving
from ivtp.evaluation.speed import Stopwatch, count
from ivtp.evaluation.statistics import passing, summary
from ivtp.progress import progress
from ivtp.pruning.cost import cost
from ivtp.registry import UserError
from ivtp.report.viewer import drawable
from ivtp.report.wandb_run import log_row


def fewer_crops(outcomes: list[dict]) -> dict[str, int]:
    """Of a model whose crops are limited: the number of images that the checkpoint would have cut into more crops."""
    counts = [outcome["fewer_crops"] for outcome in outcomes if "fewer_crops" in outcome]
    return {"fewer_crops": sum(counts)} if counts else {}


class Evaluator:
    """Runs rows through `Trainer.test`, keeps their per-sample outcomes in files, and logs them."""

    def __init__(self, model, processor, data, config, folder: Path, console, watch=frozenset()) -> None:
        self.model, self.processor, self.data, self.config = model, processor, data, config
        self.folder, self.console, self.watch = folder, console, watch
        trainer = config.trainer
        if is_encoder(config) and (trainer.compile or trainer.vision_batch or trainer.pack):
            raise UserError(
                "trainer.compile, trainer.pack and trainer.vision_batch are about a tower before a language model; "
                "leave them out"
            )
        if config.measure and shape_of(model).by_image:
            raise UserError("measure=true counts one size of images, but this model reads several; leave it out")
        self.device = next(model.parameters()).device
        self.shared = None
        if config.trainer.share_mib and not config.measure and not is_encoder(config):
            self.shared = SharedVision(config.trainer.share_mib << 20)
        self.outcomes: dict[str, list[dict]] = {}

    def share(self, rows: list) -> None:
        """Keep of the vision side what this row and later ones need; a row that shares with none keeps nothing."""
        if self.shared is not None:
            self.shared.keep_for([row.plan for row in rows])
            later = [vision_side(row.plan) for row in rows[1:]]
            self.shared.open = vision_side(rows[0].plan) in later

    def outcome_file(self, key: str) -> Path:
        return self.folder / "outcomes" / f"{key}.jsonl"

    def read(self, key: str) -> list[dict]:
        if key not in self.outcomes:
            self.outcomes[key] = records.read(self.outcome_file(key))[0]
        return self.outcomes[key]

    def evaluate(self, key: str, row, title: str) -> dict:
        """The record of one row; goes on after the samples that an earlier, stopped run has answered."""
        path = self.outcome_file(key)
        outcomes = self.read(key)
        watch, before = self.stopwatch(), len(outcomes)
        hits = self.shared.hits if self.shared else 0
        with progress(self.console, title, len(self.data.data), before) as tell:

            def record(new: list[dict]) -> None:
                records.append(path, new)
                outcomes.extend(new)
                tell(len(outcomes))

            module = self.module(row, record, watch)

            def test(batch_size: int) -> None:
                self.data.batch_size = batch_size
                self.data.done = {outcome["id"] for outcome in outcomes}
                self.trainer().test(module, datamodule=self.data, verbose=False)

            if before < len(self.data.data):
                halving(
                    test, self.data.batch_size, lambda words: self.console.print(f"{title}: {words}", soft_wrap=True)
                )
            if self.config.trainer.sort:
                outcomes[:] = self.data.as_they_come(outcomes)
                records.replace(path, records.lines(outcomes))
        metrics = summary(outcomes) | measured(self.data.scores(outcomes, self.folder))
        rate = (len(outcomes) - before) / module.seconds if module.seconds else None
        speed = f", {rate:.0f} questions/s" if rate else ""
        self.console.print(f"{title}: {headline(metrics)}, {row.cost.total / 1e9:.4g} GFLOPs{speed}", soft_wrap=True)
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
            "drawable": drawable(shape_of(self.model)),
            **fewer_crops(outcomes),
            "metrics": metrics,
            "speed": {
                "questions_per_second": rate,
                "batch_size": self.data.batch_size,
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

    def module(self, row, record, watch) -> LightningModule:
        """What carries the plan out: answers to questions, or classes of images."""
        part = {"part": watch} if watch else {}
        trainer = self.config.trainer
        if is_encoder(self.config):
            return Classify(self.processor, self.data.source.classes, row.plan, record, self.watch, **part)
        more = {"shared": self.shared, "judge": self.data.judge} | part
        more |= {"vision_batch": trainer.vision_batch, "compile": trainer.compile}
        generation = self.data.generation or {"max_new_tokens": self.config.data.max_new_tokens}
        return Answer(self.model, self.processor, row.planner, record, watch=self.watch, generation=generation, **more)

    def trainer(self) -> Trainer:
        return Trainer(
            accelerator="cpu" if self.device.type == "cpu" else "gpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def stopwatch(self):
        """Takes the time of each part, where the experiment measures."""
        if not self.config.measure:
            return None

        return Stopwatch(torch.cuda.synchronize) if self.device.type == "cuda" else Stopwatch()

    def count(self, plan) -> dict:
        """FLOPs of one prefill of the first sample: as torch counts the executed ones, and in closed form."""
        batch = self.data.collate([self.data.data[0]])
        inputs = {name: value.to(self.device) for name, value in batch.inputs.items()}
        question, shape, words, read = batch.samples[0]["question"], shape_of(self.model), 0, 0
        if is_encoder(self.config):
            counted = count(
                self.model, plan, lambda: self.processor.see(inputs["pixel_values"]), question, rest="vision"
            )
        else:
            words = inputs["input_ids"].shape[1] - shape.patches
            read = len(self.processor.tokenizer(question, add_special_tokens=False)["input_ids"]) + 2
            counted = count(self.model, plan, lambda: self.model(**inputs), question)
        closed = cost(shape, plan, words, read, streamed=True)
        parts = ("vision", "projector", "text_encoder", "language", "pruner", "total")
        return {"counted": counted, "closed": {part: getattr(closed, part) for part in parts}}

    def log(self, record: dict, current: list[dict]) -> None:
        """One W&B run per row; what was logged once is not logged again by a run that goes on."""
        if self.config.logger.name == "none":
            return
        marker = self.folder / "wandb-logged" / record["key"]
        if marker.exists():
            return

        log_row(self.config, self.folder, record, self.read(record["key"]), self.read(current[0]["key"]), self.data)
        records.replace(marker, b"")
