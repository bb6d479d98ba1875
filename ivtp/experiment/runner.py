"""Evaluation of the rows of a run: `Trainer.test`, outcomes on disk as they come, results, Weights & Biases."""

from collections import Counter
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from ivtp import results as store
from ivtp.backbones import shape_of
from ivtp.backbones.family import family_of
from ivtp.backbones.text.memory import TextMemory
from ivtp.backbones.text.pairing import guide_for
from ivtp.backbones.vlm.adapter import VLMAdapter
from ivtp.backbones.vlm.vision_cache import VisionCache, vision_side
from ivtp.core.flops import cost
from ivtp.data.batch_cache import BatchCache
from ivtp.data.batches import Batch
from ivtp.data.failures import MEMORY, READING, Failed, answered, failures, own, read
from ivtp.data.loader import default_workers
from ivtp.data.outcomes import Outcome
from ivtp.evaluation.answering import Answer
from ivtp.evaluation.classification import Classify
from ivtp.evaluation.isolated import OutcomeWriter
from ivtp.evaluation.profiling import PARTS, Stopwatch, count
from ivtp.evaluation.progress import RowProgress
from ivtp.evaluation.statistics import passing, summary
from ivtp.evaluation.task_metrics import headline, measured
from ivtp.experiment import ranks
from ivtp.experiment.outcome_files import OutcomeFiles
from ivtp.experiment.planning import Planned, is_encoder
from ivtp.registry import UserError
from ivtp.report import loggers
from ivtp.report.viewer import drawable
from ivtp.report.wandb import in_sweep
from ivtp.results import Result

FIRST = 8
"""Failures of readable samples without a success that end a row, if the last sample of all fails too: then the request is at
fault. Files may be missing in any number."""


class Evaluator:
    """Evaluator of rows by `Trainer.test`; outcomes are kept in files, and logged.

    Of several ranks each evaluates every n-th batch of a row that is left. Their trainers know nothing of each other: they
    may stop, and run out of memory, at any batch. Rank 0 merges the outcomes and computes the result.
    """

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
        workers, here = trainer.workers, ranks.on_this_machine(trainer)
        data.workers = default_workers(self.device, here) if workers is None else workers
        self.cache_bytes = (trainer.cache_mib << 20) // here
        data.pin = self.device.type == "cuda"
        if data.pin and not data.workers and workers is None:
            self.say("the main process prepares all images: /dev/shm has too little room for batches of workers")
        shared = trainer.share_mib and not config.measure and not is_encoder(config)
        self.vision_cache = VisionCache(trainer.share_mib << 20) if shared else None
        self.outcomes: dict[str, list[Outcome]] = {}
        self.files = OutcomeFiles(folder, data.survey.ids, self.say)
        self.most: int | None = None  # samples at once, after memory did not suffice

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, soft_wrap=True)

    @cached_property
    def adapter(self) -> VLMAdapter:
        """The model's VLM adapter, which lays out each size of images once for all batches and rows."""
        return family_of(self.model).adapter(self.model)

    @cached_property
    def text_memory(self) -> TextMemory | None:
        """The model's text encoder, which reads each instruction once for all batches and rows; None where parts are timed."""
        if self.config.measure:
            return None
        questions = self.data.survey.questions
        order = self.data.order if self.data.sort else range(len(questions))  # whatever fails to be read
        return TextMemory(guide_for(self.model).encoder, [questions[index] for index in order])

    def share(self, rows: list[Planned]) -> None:
        """Limit the caches to the needs of this row and later ones; a row that shares with none caches nothing."""
        if self.cache_bytes and len(rows) > 1 and self.data.cache is None:
            self.data.cache = BatchCache(self.folder, self.cache_bytes, self.say)
        if self.data.cache is not None:
            self.data.cache.open = len(rows) > 1
        if self.vision_cache is not None:
            self.vision_cache.keep_for([row.plan for row in rows])
            later = [vision_side(row.plan) for row in rows[1:]]
            self.vision_cache.open = vision_side(rows[0].plan) in later

    def close(self) -> None:
        """Give back what the rows shared on disk."""
        if self.data.cache is not None:
            self.data.cache.close()
            self.data.cache = None

    def read(self, key: str) -> list[Outcome]:
        """Outcomes of a row so far, those that are being evaluated aside."""
        if key not in self.outcomes:
            self.outcomes[key] = store.read_outcomes(self.files.merged(key))
        return self.outcomes[key]

    def write(self, key: str, outcomes: list[Outcome]) -> None:
        """Make these the outcomes of a row, in memory and on disk."""
        self.files.write(key, outcomes)
        self.outcomes[key] = outcomes

    def supports(self, result: Result) -> bool:
        """True if the outcomes on disk are those of a result; prints where they are not."""
        self.outcomes[result.key] = outcomes = self.files.gather(result.key)
        if store.agree(result, outcomes):
            return True
        text = f"{len(outcomes)} outcomes on disk are not those of its result, and what is missing is evaluated again"
        self.say(f"row {result.label!r}: {text}")
        return False

    def left(self, key: str) -> list[list[int]]:
        """Batches of a row that are to be evaluated: those that are not done as a whole, and samples that failed.

        Outcomes of a part of a batch are dropped: a sample's last bits may depend on the batch. For rank 0.
        """
        survey = self.data.survey
        outcomes = {outcome["id"]: outcome for outcome in self.files.gather(key)}
        known = {failed.sample["id"]: failed.outcome() for failed in survey.failed.values()}
        again = {outcome["id"] for outcome in failures(list(outcomes.values()))} - known.keys()
        outcomes |= known
        left = self.data.missing(outcomes, again)
        dropped = {survey.ids[index] for batch in left for index in batch} - again
        self.write(key, self.data.in_data_order([o for name, o in outcomes.items() if name not in dropped]))
        return left

    def answer(self, row: Planned, title: str) -> tuple[float | None, Stopwatch | None]:
        """Evaluate what is left of a row; return questions per second, and time per part, where it is taken, of this rank.

        Raises UserError where no sample can be evaluated: known after FIRST samples, or at the end.
        """
        key, total = row.key, len(self.data.data)
        left = ranks.shared(lambda: self.left(key))
        mine = left[ranks.number() :: ranks.world()]
        watch = Stopwatch(self.device) if self.config.measure else None
        module = self.module(row, watch)
        outcomes, new = list(self.read(key)), 0
        failed: list[Outcome] = []  # while nothing has been answered

        def record(batch: list[Outcome]) -> None:
            nonlocal new
            ranks.check()
            self.files.append(key, ranks.number(), batch)
            outcomes.extend(batch)
            new += len(answered(batch))
            if len(failed) < FIRST and all("failed" in outcome for outcome in outcomes):
                failed.extend(outcome for outcome in batch if outcome["cause"] != READING)
                if len(failed) >= FIRST and not self.works(module):
                    raise nothing_works(row.label, f"the first {len(failed)} samples", failed[0])

        if mine:
            self.data.left = mine
            own, all_of = sum(map(len, mine)), sum(map(len, left))
            progress = RowProgress(self.console, title, total, total - all_of, share=own / all_of)
            module.say = lambda line: self.say(f"{title}: {line}")
            module.most = self.most
            self.test(module, [OutcomeWriter(record), progress])
            self.most = module.most
        ranks.barrier()
        if left and ranks.first():
            self.write(key, self.files.gather(key))
            if missing := total - len(self.outcomes[key]):
                raise UserError(
                    f"row {row.label!r}: {missing} outcomes of other ranks are not in {self.files.folder}; all need to share "
                    "it, and the same command goes on from here"
                )
        if ranks.first() and len(lost := failures(self.read(key))) == total:
            raise nothing_works(row.label, f"the {total} samples", lost[0])
        if watch is not None and new:
            watch.seconds = {part: seconds / new for part, seconds in watch.seconds.items()}
        return (new / module.seconds if module.seconds else None), watch

    def lost(self, key: str, title: str) -> dict | None:
        """Number and causes of failed samples, printed; None where every sample has a result."""
        causes = Counter(outcome["cause"] for outcome in failures(self.read(key)))
        if not causes:
            return None
        counts = ", ".join(f"{count} {cause}" for cause, count in causes.items())
        text = f"{causes.total()} of {len(self.data.data)} samples failed ({counts}) and are left out of every number"
        self.say(f"{title}: {text}, reasons in {self.files.merged(key)}")
        return {"n": causes.total(), "causes": dict(causes.most_common())}

    def blind(self, row: Planned) -> Result | None:
        """Result on the questions without their images; None in ranks but the first."""
        title = row.label
        self.answer(row, title)
        if not ranks.first():
            return None
        metrics = summary(answered(self.read(row.key)))
        self.say(f"{title}: {headline(metrics)}")
        return Result(key=row.key, label=title, pruner=row.pruner, metrics=metrics, failed=self.lost(row.key, title))

    def evaluate(self, row: Planned, title: str) -> Result | None:
        """Fill in the evaluation of a planned row; None in ranks but the first. See `answer`."""
        hits = self.vision_cache.hits if self.vision_cache else 0
        rate, watch = self.answer(row, title)
        if not ranks.first():
            return None
        outcomes = self.read(row.key)
        done = answered(outcomes)
        images = {outcome["image"] for outcome in failures(outcomes)}
        crops = [outcome["fewer_crops"] for outcome in outcomes if "fewer_crops" in outcome]  # only if they are limited
        metrics = summary(done) | measured(self.data.scores(done, self.folder), images)
        throughput = f", {rate:.0f} questions/s" if rate else ""
        self.say(f"{title}: {headline(metrics)}, {row.cost.total / 1e9:.4g} GFLOPs{throughput}")
        speed = {
            "questions_per_second": rate,
            "batch_size": self.most or self.data.batch_size,
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
        more = {"vision_cache": self.vision_cache, "scorer": self.data.scorer, "adapter": self.adapter} | part
        if row.plan.reads_text and self.text_memory is not None:
            more["text_encoder"] = self.text_memory
        more |= {"vision_batch": trainer.vision_batch, "compile": trainer.compile}
        generation = self.data.generation or {"max_new_tokens": self.config.data.max_new_tokens}
        return Answer(self.model, self.processor, row.planner, watch=self.watch, generation=generation, **more)

    def batch(self, samples: list[dict]) -> Batch:
        """A batch of samples, read again, on the model's device."""
        return self.data.again(samples).to(self.device)

    def test(self, module: Answer | Classify, callbacks: list[Callback]) -> None:
        """Evaluate the batches of this rank."""
        for metric in (module.accuracy, module.top5):
            if metric is not None:
                # A rank may have no batch, and so no metric to meet with. (`sync_on_compute` counts at construction only.)
                metric.distributed_available_fn = lambda: False
        cpu = self.device.type == "cpu"
        Trainer(
            callbacks=callbacks,
            accelerator="cpu" if cpu else "gpu",
            devices=1 if cpu else [self.device.index or 0],
            precision=self.config.trainer.precision,
            plugins=[LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).test(module, datamodule=self.data, verbose=False)

    def works(self, module) -> bool:
        """True if the last sample, the smallest one of sorted ones, can be evaluated."""
        sample = read(self.data.data, self.data.order[-1])
        if isinstance(sample, Failed):
            return False
        try:
            batch = self.batch([sample])
            return bool(batch.samples and answered(module.outcomes(batch)))
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
            prefill = partial(self.processor.outputs, inputs["pixel_values"])
            counted = count(self.model, plan, prefill, question, rest="vision")
        else:
            words = inputs["input_ids"].shape[1] - shape.patches
            if plan.reads_text:
                (read,) = guide_for(self.model).encoder.lengths([question])
            counted = count(self.model, plan, lambda: self.model(**inputs), question)
        closed = cost(shape, plan, words, read, streamed=True)
        return {"counted": counted, "closed": {part: getattr(closed, part) for part in (*PARTS, "total")}}

    def log(self, result: Result, first: Result, last: bool) -> None:
        """Log a row, compared with the first one; an agent of a sweep waits for the last one alone."""
        if last or not in_sweep():
            loggers.log(self.config.logger, self.folder, result, lambda row: self.read(row.key), first, self.data)


def nothing_works(label: str, which: str, first: Outcome) -> UserError:
    """Error of a row without a single result."""
    fix = (
        "; give the model fewer bytes (model.dtype=bfloat16), free the device of other work, or keep nothing of the tower "
        "(trainer.share_mib=0)"
    )
    reason = f"the first {first['cause']}: {first['failed']}" + fix * (first["cause"] == MEMORY)
    return UserError(f"row {label!r}: none of {which} can be evaluated; {reason}")
