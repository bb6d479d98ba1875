"""Evaluation of the rows of a run: `Trainer.test`, outcomes on disk as they come, results, Weights & Biases."""

import signal
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ivtp import results as store
from ivtp.backbones import shape_of
from ivtp.backbones.text.pairing import guide_for
from ivtp.backbones.vlm.vision_cache import VisionCache, vision_side
from ivtp.core.flops import cost
from ivtp.data.datamodule import Batch
from ivtp.data.failures import READING, Failed, answered, failures, own, read
from ivtp.data.outcomes import Outcome
from ivtp.evaluation.answering import Answer
from ivtp.evaluation.classification import Classify
from ivtp.evaluation.isolated import OutcomeWriter, halving
from ivtp.evaluation.profiling import PARTS, Stopwatch, count
from ivtp.evaluation.progress import RowProgress
from ivtp.evaluation.statistics import passing, summary
from ivtp.evaluation.task_metrics import headline, measured
from ivtp.experiment.planning import Planned, is_encoder
from ivtp.registry import Terminated, UserError
from ivtp.report.viewer import drawable
from ivtp.report.wandb import log_row
from ivtp.results import Result

FIRST = 8
"""Failures of readable samples without a success that end a row, if the last sample of all fails too: then the request is at
fault. Files may be missing in any number."""


class Evaluator:
    """Evaluator of rows by `Trainer.test`; outcomes are kept in files, and logged."""

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
        share = config.trainer.share_mib and not config.measure and not is_encoder(config)
        self.vision_cache = VisionCache(config.trainer.share_mib << 20) if share else None
        self.outcomes: dict[str, list[Outcome]] = {}

    def share(self, rows: list[Planned]) -> None:
        """Limit the vision cache to the needs of this row and later ones; a row that shares with none caches nothing."""
        if self.vision_cache is not None:
            self.vision_cache.keep_for([row.plan for row in rows])
            later = [vision_side(row.plan) for row in rows[1:]]
            self.vision_cache.open = vision_side(rows[0].plan) in later

    def outcome_file(self, key: str) -> Path:
        """File of the outcomes of a row."""
        return self.folder / "outcomes" / f"{key}.jsonl"

    def read(self, key: str) -> list[Outcome]:
        """Outcomes of a row so far."""
        if key not in self.outcomes:
            self.outcomes[key] = store.read_outcomes(self.outcome_file(key))
        return self.outcomes[key]

    def rewrite(self, key: str, outcomes: list[Outcome]) -> None:
        """Replace the outcomes of a row, in memory and on disk."""
        self.outcomes[key][:] = outcomes
        store.replace(self.outcome_file(key), store.lines(store.with_schema(outcomes)))

    def append(self, key: str, outcomes: list[Outcome]) -> None:
        """Add to the outcomes of a row, on disk first."""
        store.append(self.outcome_file(key), store.with_schema(outcomes))
        self.outcomes[key].extend(outcomes)

    def answer(self, row: Planned, title: str) -> tuple[list[Outcome], float | None, Stopwatch | None]:
        """Outcomes of one row, questions per second, and time per part, where it is taken.

        Goes on after the samples that an earlier, stopped run has answered, and tries again those that failed in it.
        Raises UserError where no sample can be evaluated: known after FIRST samples, or at the end.
        """
        key, outcomes = row.key, self.read(row.key)
        again = bool(failures(outcomes))
        if again:
            self.rewrite(key, answered(outcomes))
        watch = Stopwatch(self.device) if self.config.measure else None
        before, total = len(outcomes), len(self.data.data)
        failed: list[Outcome] = []  # while nothing has been answered

        def record(new: list[Outcome]) -> None:
            self.append(key, new)
            if len(failed) < FIRST and all("failed" in outcome for outcome in outcomes):
                failed.extend(outcome for outcome in new if outcome["cause"] != READING)
                if len(failed) >= FIRST and not self.works(module):
                    raise nothing_works(row.label, f"the first {len(failed)} samples", failed[0])

        module = self.module(row, watch)
        if before < total:
            self.append(key, [failure.outcome() for failure in self.data.survey.failed.values()])
            callbacks = [OutcomeWriter(record), RowProgress(self.console, title, total, len(outcomes))]

            def test(batch_size: int) -> None:
                self.data.batch_size = batch_size
                self.data.done = {outcome["id"] for outcome in outcomes}
                if len(outcomes) < total:
                    self.test(module, callbacks)

            self.data.batch_size = halving(
                test, self.data.batch_size, lambda words: self.console.print(f"{title}: {words}", soft_wrap=True)
            )
        lost = failures(outcomes)
        if len(lost) == total:
            raise nothing_works(row.label, f"the {total} samples", lost[0])
        if self.config.trainer.sort or again or lost:
            self.rewrite(key, self.data.in_data_order(outcomes))
        new = len(answered(outcomes)) - before
        if watch is not None and new:
            watch.seconds = {part: seconds / new for part, seconds in watch.seconds.items()}
        return outcomes, (new / module.seconds if module.seconds else None), watch

    def lost(self, key: str, title: str) -> dict | None:
        """Number and causes of failed samples, printed; None where every sample has a result."""
        causes = Counter(outcome["cause"] for outcome in failures(self.read(key)))
        if not causes:
            return None
        counts = ", ".join(f"{count} {cause}" for cause, count in causes.items())
        text = f"{causes.total()} of {len(self.data.data)} samples failed ({counts}) and are left out of every number"
        self.console.print(f"{title}: {text}, reasons in {self.outcome_file(key)}", soft_wrap=True)
        return {"n": causes.total(), "causes": dict(causes.most_common())}

    def blind(self, row: Planned) -> Result:
        """Result on the questions without their images."""
        title = "without images"
        metrics = summary(answered(self.answer(row, title)[0]))
        self.console.print(f"{title}: {headline(metrics)}", soft_wrap=True)
        return Result(key=row.key, label=title, pruner=row.pruner, metrics=metrics, failed=self.lost(row.key, title))

    def evaluate(self, row: Planned, title: str) -> Result:
        """Fill in the evaluation of a planned row; see `answer`."""
        hits = self.vision_cache.hits if self.vision_cache else 0
        outcomes, rate, watch = self.answer(row, title)
        done = answered(outcomes)
        images = {outcome["image"] for outcome in failures(outcomes)}
        crops = [outcome["fewer_crops"] for outcome in outcomes if "fewer_crops" in outcome]  # only if they are limited
        metrics = summary(done) | measured(self.data.scores(done, self.folder), images)
        throughput = f", {rate:.0f} questions/s" if rate else ""
        self.console.print(
            f"{title}: {headline(metrics)}, {row.cost.total / 1e9:.4g} GFLOPs{throughput}", soft_wrap=True
        )
        speed = {
            "questions_per_second": rate,
            "batch_size": self.data.batch_size,
            "shared": bool(self.vision_cache and self.vision_cache.hits > hits),
        }
        reads_words = row.plan.reads_clip and row.plan.words == "te_rt"
        return replace(
            row,
            metrics=metrics,
            failed=self.lost(row.key, title),
            speed=speed | ({"parts": watch.seconds} if watch and rate else {}),
            drawable=drawable(shape_of(self.model)),
            fewer_crops=sum(crops) if crops else None,
            counted=self.count(row.plan, done[0]["id"]) if self.config.measure else None,
            words=passing(done, row.plan.tau) if reads_words else None,
        )

    def module(self, row: Planned, watch: Stopwatch | None) -> Answer | Classify:
        """LightningModule of a row: it answers questions, or sorts images into classes."""
        part: dict[str, Any] = {"collate": self.batch} | ({"part": watch} if watch else {})
        trainer = self.config.trainer
        if is_encoder(self.config):
            return Classify(self.processor, self.data.source.classes, row.plan, self.watch, **part)
        more = {"vision_cache": self.vision_cache, "scorer": self.data.scorer} | part
        more |= {"vision_batch": trainer.vision_batch, "compile": trainer.compile}
        generation = self.data.generation or {"max_new_tokens": self.config.data.max_new_tokens}
        return Answer(self.model, self.processor, row.planner, watch=self.watch, generation=generation, **more)

    def batch(self, samples: list[dict]) -> Batch:
        """A batch of samples on the model's device."""
        return self.data.transfer_batch_to_device(self.data.collate(samples), self.device, 0)

    def test(self, module: LightningModule, callbacks: list[Callback]) -> None:
        """Evaluate the samples that are not done; an interrupt ends it as elsewhere."""
        extras = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        accelerator = "cpu" if self.device.type == "cpu" else "gpu"
        trainer = Trainer(callbacks=callbacks, accelerator=accelerator, devices=1, **dict.fromkeys(extras, False))
        try:
            trainer.test(module, datamodule=self.data, verbose=False)
        except SIGTERMException:
            raise Terminated from None
        except SystemExit as end:
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores further ones
            raise KeyboardInterrupt from None

    def works(self, module) -> bool:
        """True if the last sample, the smallest one of sorted ones, can be evaluated."""
        sample = read(self.data.data, self.data.order[-1])
        if isinstance(sample, Failed):
            return False
        try:
            return bool(answered(module.outcomes(self.batch([sample]))))
        except Exception as error:
            if not own(error):
                raise
            return False

    def count(self, plan, name: str) -> dict:
        """FLOPs of one prefill of a sample: as torch counts the executed ones, and in closed form."""
        batch = self.batch([self.data.data[self.data.survey.ids.index(name)]])
        inputs = batch.inputs
        question, shape, words, read = batch.samples[0]["question"], shape_of(self.model), 0, 0
        if is_encoder(self.config):
            prefill = partial(self.processor.see, inputs["pixel_values"])
            counted = count(self.model, plan, prefill, question, rest="vision")
        else:
            words = inputs["input_ids"].shape[1] - shape.patches
            if plan.reads_text:
                (read,) = guide_for(self.model).encoder.lengths([question])
            counted = count(self.model, plan, lambda: self.model(**inputs), question)
        closed = cost(shape, plan, words, read, streamed=True)
        return {"counted": counted, "closed": {part: getattr(closed, part) for part in (*PARTS, "total")}}

    def marker(self, key: str) -> Path:
        """File that marks a row as logged to W&B."""
        return self.folder / "wandb-logged" / key

    def unlogged(self, key: str) -> None:
        """Mark the row as not logged: its result is new."""
        self.marker(key).unlink(missing_ok=True)

    def log(self, result: Result, first: Result) -> None:
        """Log a row to W&B, compared with the first one, unless an earlier run did."""
        marker = self.marker(result.key)
        if self.config.logger.name == "none" or marker.exists():
            return
        log_row(self.config, self.folder, result, self.read(result.key), self.read(first.key), self.data)
        store.replace(marker, b"")


def nothing_works(label: str, which: str, first: Outcome) -> UserError:
    """Error of a row without a single result."""
    return UserError(f"row {label!r}: none of {which} can be evaluated; the first {first['cause']}: {first['failed']}")
