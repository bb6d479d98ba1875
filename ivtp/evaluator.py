"""Carries out the rows of a run: `Trainer.test`, outcomes on disk as they come, records, Weights & Biases."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ivtp import records
from ivtp.backbones.companions import guide_for
from ivtp.backbones.shared import SharedVision, vision_side
from ivtp.build import is_encoder, shape_of
from ivtp.data.batches import Batch
from ivtp.data.failures import READING, Failed, answered, failures, own, read
from ivtp.evaluation.answer import Answer
from ivtp.evaluation.benchmarks import headline, measured
from ivtp.evaluation.classify import Classify
from ivtp.evaluation.memory import halving
from ivtp.evaluation.speed import Stopwatch, count
from ivtp.evaluation.statistics import passing, summary
from ivtp.progress import progress
from ivtp.pruning.cost import cost
from ivtp.registry import Terminated, UserError
from ivtp.report.viewer import drawable
from ivtp.report.wandb_run import log_row

FIRST = 8
"""A row ends where none of so many samples can be evaluated although they can be read, and the last one of all cannot either:
the request is at fault. Files may be missing in any number."""


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

    def answer(self, key: str, row, title: str) -> tuple[list[dict], float | None, Stopwatch | None]:
        """Outcomes of one row, questions per second, and time per part, where it is taken.

        Goes on after the samples that an earlier, stopped run has answered, and tries again those that failed in it.
        Raises UserError where no sample can be evaluated: known after FIRST samples, or at the end.
        """
        path = self.outcome_file(key)
        outcomes = self.read(key)
        again = bool(failures(outcomes))
        if again:
            outcomes[:] = answered(outcomes)
            records.replace(path, records.lines(outcomes))
        watch, before, total = self.stopwatch(), len(outcomes), len(self.data.data)
        with progress(self.console, title, total, before) as tell:
            failed: list[dict] = []  # while nothing has been answered

            def record(new: list[dict]) -> None:
                records.append(path, new)
                outcomes.extend(new)
                tell(len(outcomes))
                if len(failed) < FIRST and all("failed" in outcome for outcome in outcomes):
                    failed.extend(outcome for outcome in new if outcome["cause"] != READING)
                    if len(failed) >= FIRST and not self.works(module):
                        raise nothing_works(row.label, f"the first {len(failed)} samples", failed[0])

            module = self.module(row, record, watch)

            def test(batch_size: int) -> None:
                self.data.batch_size = batch_size
                self.data.done = {outcome["id"] for outcome in outcomes}
                if len(outcomes) < total:
                    self.test(module)

            if before < total:
                known = [found.outcome() for found in self.data.survey.failed.values()]
                records.append(path, known)
                outcomes.extend(known)
                self.data.batch_size = halving(
                    test, self.data.batch_size, lambda words: self.console.print(f"{title}: {words}", soft_wrap=True)
                )
            lost = failures(outcomes)
            if len(lost) == total:
                raise nothing_works(row.label, f"the {total} samples", lost[0])
            if self.config.trainer.sort or again or lost:
                outcomes[:] = self.data.as_they_come(outcomes)
                records.replace(path, records.lines(outcomes))
        new = len(answered(outcomes)) - before
        if watch is not None and new:
            watch.seconds = {part: seconds / new for part, seconds in watch.seconds.items()}
        return outcomes, (new / module.seconds if module.seconds else None), watch

    def lost(self, key: str, title: str) -> dict:
        """Field `failed` of a record, said on the console; empty where every sample has a result."""
        causes = Counter(outcome["cause"] for outcome in failures(self.read(key)))
        if not causes:
            return {}
        said = told(causes, len(self.data.data))
        self.console.print(f"{title}: {said}, reasons in {self.outcome_file(key)}", soft_wrap=True)
        return {"failed": {"n": causes.total(), "causes": dict(causes.most_common())}}

    def blind(self, key: str, row) -> dict:
        """Metrics of questions asked without their images."""
        title = "without images"
        done = answered(self.answer(key, row, title)[0])
        metrics = summary(done)
        self.console.print(f"{title}: {headline(metrics)}", soft_wrap=True)
        return {"key": key, "label": title, "metrics": metrics} | self.lost(key, title)

    def evaluate(self, key: str, row, title: str) -> dict:
        """The record of one row; see `answer`."""
        hits = self.shared.hits if self.shared else 0
        outcomes, rate, watch = self.answer(key, row, title)
        done = answered(outcomes)
        images = {outcome["image"] for outcome in failures(outcomes)}
        metrics = summary(done) | measured(self.data.scores(done, self.folder), images)
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
            **self.lost(key, title),
            "speed": {
                "questions_per_second": rate,
                "batch_size": self.data.batch_size,
                "shared": bool(self.shared and self.shared.hits > hits),
            }
            | ({"parts": watch.seconds} if watch and rate else {}),
            **({"counted": self.count(plan, done[0]["id"])} if self.config.measure else {}),
            **({"words": passing(done, plan.tau)} if plan.reads_clip and plan.words == "te_rt" else {}),
        }

    def module(self, row, record, watch) -> LightningModule:
        """What carries the plan out: answers to questions, or classes of images."""
        part = {"collate": self.batch} | ({"part": watch} if watch else {})
        trainer = self.config.trainer
        if is_encoder(self.config):
            return Classify(self.processor, self.data.source.classes, row.plan, record, self.watch, **part)
        more = {"shared": self.shared, "judge": self.data.judge} | part
        more |= {"vision_batch": trainer.vision_batch, "compile": trainer.compile}
        generation = self.data.generation or {"max_new_tokens": self.config.data.max_new_tokens}
        return Answer(self.model, self.processor, row.planner, record, watch=self.watch, generation=generation, **more)

    def batch(self, samples: list[dict]) -> Batch:
        """A batch of samples on the model's device."""
        return self.data.transfer_batch_to_device(self.data.collate(samples), self.device, 0)

    def test(self, module: LightningModule) -> None:
        """Evaluate what is not done; an interrupt ends it as elsewhere."""
        try:
            self.trainer().test(module, datamodule=self.data, verbose=False)
        except SIGTERMException:
            raise Terminated from None
        except SystemExit as end:
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores further ones
            raise KeyboardInterrupt from None

    def works(self, module) -> bool:
        """Whether the last sample can be evaluated: where samples are sorted, the smallest one."""
        sample = read(self.data.data, self.data.order[-1])
        if isinstance(sample, Failed):
            return False
        try:
            return bool(answered(module.outcomes(self.batch([sample]))))
        except Exception as error:
            if not own(error):
                raise
            return False

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

    def count(self, plan, name: str) -> dict:
        """FLOPs of one prefill of a sample: as torch counts the executed ones, and in closed form."""
        batch = self.batch([self.data.data[self.data.survey.ids.index(name)]])
        inputs = batch.inputs
        question, shape, words, read = batch.samples[0]["question"], shape_of(self.model), 0, 0
        if is_encoder(self.config):
            counted = count(
                self.model, plan, lambda: self.processor.see(inputs["pixel_values"]), question, rest="vision"
            )
        else:
            words = inputs["input_ids"].shape[1] - shape.patches
            if plan.reads_clip or plan.reads_relevance:
                (read,) = guide_for(self.model).encoder.lengths([question])
            counted = count(self.model, plan, lambda: self.model(**inputs), question)
        closed = cost(shape, plan, words, read, streamed=True)
        parts = ("vision", "projector", "text_encoder", "language", "pruner", "total")
        return {"counted": counted, "closed": {part: getattr(closed, part) for part in parts}}

    def marker(self, key: str) -> Path:
        """The file that says that a row is in W&B."""
        return self.folder / "wandb-logged" / key

    def unlogged(self, key: str) -> None:
        """Log the row (again): its result is new."""
        self.marker(key).unlink(missing_ok=True)

    def log(self, record: dict, current: list[dict]) -> None:
        """One W&B run per row; what was logged once is not logged again by a run that goes on."""
        if self.config.logger.name == "none":
            return
        marker = self.marker(record["key"])
        if marker.exists():
            return

        log_row(self.config, self.folder, record, self.read(record["key"]), self.read(current[0]["key"]), self.data)
        records.replace(marker, b"")


def nothing_works(label: str, which: str, first: dict) -> UserError:
    return UserError(f"row {label!r}: none of {which} can be evaluated; the first {first['cause']}: {first['failed']}")


def told(causes: dict[str, int], total: int) -> str:
    """ "3 of 200 samples failed (2 cannot be read, 1 out of memory)"."""
    counts = ", ".join(f"{count} {cause}" for cause, count in causes.items())
    return f"{sum(causes.values())} of {total} samples failed ({counts}) and are left out of every number"
