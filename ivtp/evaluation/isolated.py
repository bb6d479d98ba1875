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

from ivtp.data.datamodule import Batch, images_of
from ivtp.data.failures import ANSWERING, MEMORY, failure
from ivtp.registry import UserError


class Isolated(L.LightningModule):
    """Base of the test modules: a batch that fails is halved, down to the samples that fail alone.

    `test_step` returns {"outcomes": [...]}, which callbacks write and count; accuracies are means over outcomes.

    collate  samples → a batch on the model's device; None: nothing is halved, and every error is raised
    """

    def __init__(self, collate: Callable[[list[dict]], Batch] | None) -> None:
        super().__init__()
        self.collate = collate
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
        """Outcomes of a batch; after a sample that does not fit into memory alone, those behind it are left out."""
        outcomes = [failed.outcome() for failed in batch.failed]
        outcomes += self._evaluate(batch) if batch.samples else []
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

    def on_test_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Raise DoesNotFit after such a sample; Lightning calls this hook after those of the callbacks."""
        last = outputs["outcomes"][-1]
        if last.get("cause") == MEMORY:
            raise DoesNotFit(last["id"])

    def _evaluate(self, batch: Batch) -> list[dict]:
        try:
            return self.outcomes(batch)
        except Exception as error:
            check_device(error)
            memory, alone = out_of_memory(error), len(batch.samples) == 1
            if self.collate is None or (memory and not alone):  # a smaller batch may fit: see `halving`
                raise
            failed = failure(batch.samples[0], error, MEMORY if memory else ANSWERING)
            if memory:
                sizes = [f"{width} × {height}" for width, height in (image.size for image in images_of(failed.sample))]
                failed = replace(failed, reason=f"image of {', '.join(sizes) or 'no'} pixels: {failed.reason}")
        # Outside of the handler, so that nothing holds on to the tensors of the batch that failed.
        if alone:
            return [failed.outcome()]
        half, outcomes = (len(batch.samples) + 1) // 2, []
        for part in (batch.samples[:half], batch.samples[half:]):
            outcomes += self._evaluate(self.collate(part))
            if outcomes[-1].get("cause") == MEMORY:
                break
        return outcomes


class OutcomeWriter(L.Callback):
    """Pass the outcomes of every batch to a function as soon as the batch is done."""

    def __init__(self, write: Callable[[list[dict]], None]) -> None:
        self.write = write

    def on_test_batch_end(self, trainer, pl_module, outputs: Any, batch, batch_idx, dataloader_idx=0) -> None:
        """Write the outcomes of a batch."""
        self.write(outputs["outcomes"])


def out_of_memory(error: BaseException) -> bool:
    """True for an error of insufficient memory: torch's own, or one that the CPU allocator, cuBLAS or cuDNN name in words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class DoesNotFit(Exception):
    """A sample that does not fit into memory even alone; its outcome is written."""


def check_device(error: BaseException) -> None:
    """Raise a UserError for an error after which a GPU can be used by a new process only."""
    text = str(error)
    broken = isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "device-side assert" in text
    if broken and not out_of_memory(error):
        raise UserError(
            f"the device failed ({text.splitlines()[0]}); the same command goes on from here; if it fails again at the same "
            "place, CUDA_LAUNCH_BLOCKING=1 and trainer.batch_size=1 show the sample"
        ) from error


def halving(run: Callable[[int], None], size: int, say: Callable[[str], None]) -> int:
    """Call `run` with a batch size, halved whenever memory does not suffice; return the last size.

    Each call of `run` continues where the previous one stopped. After a sample that does not fit alone (DoesNotFit), the
    others continue with the initial size. Raises UserError if a batch of one runs out of memory.
    """
    initial = size
    while True:
        try:
            run(size)
            return size
        except DoesNotFit as error:
            cause, following = f"a sample does not fit into memory alone ({error}); ", initial
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise UserError(
                    "out of memory with one sample at a time (trainer.batch_size=1); give the model fewer bytes "
                    "(model.dtype=bfloat16), free the device of other work, or keep nothing of the tower (trainer.share_mib=0)"
                ) from error
            cause, following = "out of memory: ", (size + 1) // 2
        # Outside of the handlers, so that nothing holds on to the tensors of the batch that failed.
        size = following
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"{cause}going on with trainer.batch_size={size}")
