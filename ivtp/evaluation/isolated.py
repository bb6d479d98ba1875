"""A Lightning test loop in which a sample that fails becomes an outcome and leaves the rest of its batch untouched, and
which goes on with smaller batches where memory does not suffice."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torchmetrics import MeanMetric

from ivtp import signals
from ivtp.data.batches import Batch, images_of
from ivtp.data.failures import ANSWERING, MEMORY, Failed, failure, out_of_memory
from ivtp.registry import UserError


class Isolated(L.LightningModule):
    """Base of the test modules: a batch that fails is halved, down to the samples that fail alone.

    `test_step` returns {"outcomes": [...]}, which callbacks write and count; accuracies are means over outcomes. It never
    leaves a batch half done, so that every rank of several evaluates what it was given.

    collate  samples → a batch on the model's device; None: nothing is halved, and every error is raised
    most     samples that go through the model at once, less than a batch once memory did not suffice; None: a batch
    say      prints a line
    """

    def __init__(self, collate: Callable[[list[dict]], Batch] | None) -> None:
        super().__init__()
        self.collate = collate
        self.most: int | None = None
        self.whole = 1  # samples of the largest batch so far
        self.say: Callable[[str], None] = lambda line: None
        self.seconds = 0.0
        self.accuracy = MeanMetric()
        self.top5: MeanMetric | None = None

    def outcomes(self, batch: Batch) -> list[dict]:
        """One outcome per sample."""
        raise NotImplementedError

    def training_step(self, *_: Any) -> Any:
        """Refuse to train."""
        raise RuntimeError("ivtp evaluates frozen models and trains nothing; use Trainer.test(module, datamodule=...)")

    configure_optimizers = training_step

    @torch.inference_mode()
    def test_step(self, batch: Batch, index: int) -> dict[str, list[dict]]:
        """Outcomes of a batch."""
        self.whole = max(self.whole, len(batch.samples))
        outcomes = [failed.outcome() for failed in batch.failed] + self._evaluate(batch.samples, batch)
        for metric, field in ((self.accuracy, "correct"), (self.top5, "top5")):
            values = [float(outcome[field]) for outcome in outcomes if outcome.get(field) is not None]
            if metric is not None and values:
                metric.update(torch.tensor(values))
        return {"outcomes": outcomes}

    def on_test_epoch_end(self) -> None:
        """Log the accuracies of the samples that have one."""
        for name, metric in (("accuracy", self.accuracy), ("top5", self.top5)):
            if metric is not None and metric.update_count:
                self.log(name, metric)

    def _evaluate(self, samples: list[dict], batch: Batch | None = None) -> list[dict]:
        """Outcomes of samples, in parts of `most`; batch: all of them, on the device already."""
        if batch is not None and self.most is not None and self.most < len(samples):
            batch.inputs.clear()
            batch = None
        outcomes: list[dict] = []
        while len(outcomes) < len(samples):
            outcomes += self._part(samples[len(outcomes) :][: self.most], batch)
        return outcomes

    def _part(self, samples: list[dict], batch: Batch | None) -> list[dict]:
        lost: list[dict] = []
        try:
            if batch is None:
                assert self.collate is not None
                batch = self.collate(samples)
                lost = [failed.outcome() for failed in batch.failed]
                if not batch.samples:
                    return lost
            if not batch.inputs:
                raise MemoryError("not enough memory for the inputs of the batch")
            return lost + self.outcomes(batch)
        except Exception as error:
            check_workers(error)
            check_device(error)
            if self.collate is None:
                raise
            memory = out_of_memory(error)
            failed = failure(samples[0], error, MEMORY if memory else ANSWERING)
        # Outside of the handler, so that nothing holds on to the tensors of the batch that failed.
        if memory:
            self._shrink(batch, failed, len(samples))
        if len(samples) == 1:
            return [(with_sizes(failed) if memory else failed).outcome()]
        if memory:
            return self._evaluate(samples)
        half = (len(samples) + 1) // 2
        return self._evaluate(samples[:half]) + self._evaluate(samples[half:])

    def _shrink(self, batch: Batch | None, failed: Failed, samples: int) -> None:
        """Free memory and go on with half of the samples; after one that does not fit alone, with whole batches again."""
        if batch is not None:
            batch.inputs.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if samples > 1:
            self.most = (samples + 1) // 2
            self.say(f"out of memory: going on with trainer.batch_size={self.most}")
        else:
            self.most = None
            self.say(
                f"a sample does not fit into memory alone ({failed.sample['id']}); going on with "
                f"trainer.batch_size={self.whole}"
            )


def with_sizes(failed: Failed) -> Failed:
    """Failure of a sample for which memory did not suffice, with the sizes of its images."""
    sizes = [f"{width} × {height}" for width, height in (image.size for image in images_of(failed.sample))]
    return replace(failed, reason=f"image of {', '.join(sizes) or 'no'} pixels: {failed.reason}")


class OutcomeWriter(L.Callback):
    """Pass the outcomes of every batch to a function as soon as the batch is done; a signal stops the run only then."""

    def __init__(self, write: Callable[[list[dict]], None]) -> None:
        self.write = write

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        """Keep a signal in mind until the batch is done."""
        signals.defer()

    def on_test_batch_end(self, trainer, pl_module, outputs: Any, batch, batch_idx, dataloader_idx=0) -> None:
        """Write the outcomes of a batch, and stop if a signal has arrived."""
        self.write(outputs["outcomes"])
        signals.check()

    def on_exception(self, trainer, pl_module, exception) -> None:
        """Stop at once from here on: the batch is over."""
        signals.resume()


def check_workers(error: BaseException) -> None:
    """Raise a UserError where a worker process has ended, which torch says wherever the main process is."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        raise UserError(f"{text.splitlines()[0].rstrip('. ')}; the same command goes on from here") from error


def check_device(error: BaseException) -> None:
    """Raise a UserError for an error after which a GPU can be used by a new process only."""
    text = str(error)
    broken = isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "device-side assert" in text
    if broken and not out_of_memory(error):
        raise UserError(
            f"the device failed ({text.splitlines()[0]}); the same command goes on from here; if it fails again at the same "
            "place, CUDA_LAUNCH_BLOCKING=1 and trainer.batch_size=1 show the sample"
        ) from error
