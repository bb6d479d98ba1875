"""A Lightning test loop in which a sample that fails is an outcome of its own, and the others of its batch do not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import lightning as L
import torch

from ivtp.data.batches import Batch, pictures
from ivtp.data.failures import ANSWERING, MEMORY, failure
from ivtp.evaluation.memory import DoesNotFit, check_device, out_of_memory


class Isolated(L.LightningModule):
    """Hands the outcomes of every batch to `record`. A batch that fails is halved, down to the samples that fail alone.

    collate  samples → a batch on the model's device; None: nothing is halved, and every error is raised
    """

    def __init__(self, record: Callable[[list[dict]], None], collate: Callable[[list[dict]], Batch] | None) -> None:
        super().__init__()
        self.record, self.collate = record, collate
        self.seconds = 0.0

    def outcomes(self, batch: Batch) -> list[dict]:
        """One outcome per sample."""
        raise NotImplementedError

    def training_step(self, *_):
        raise RuntimeError("ivtp evaluates frozen models and trains nothing; use Trainer.test(module, datamodule=...)")

    configure_optimizers = training_step

    @torch.inference_mode()
    def test_step(self, batch: Batch, index: int) -> None:
        if batch.failed:
            self.record([failed.outcome() for failed in batch.failed])
        if batch.samples:
            self._evaluate(batch)

    def _evaluate(self, batch: Batch) -> None:
        failed = None
        try:
            found = self.outcomes(batch)
        except Exception as error:
            check_device(error)
            memory, alone = out_of_memory(error), len(batch.samples) == 1
            if self.collate is None or (memory and not alone):  # a smaller batch may fit: see `halving`
                raise
            failed = failure(batch.samples[0], error, MEMORY if memory else ANSWERING)
            if memory:
                sizes = [f"{width} × {height}" for width, height in (image.size for image in pictures(failed.sample))]
                failed = replace(failed, reason=f"image of {', '.join(sizes) or 'no'} pixels: {failed.reason}")
        # Outside of the handler, so that nothing holds on to the tensors of the batch that failed.
        if failed is None:
            self.record(found)
        elif len(batch.samples) > 1:
            half = (len(batch.samples) + 1) // 2
            for part in (batch.samples[:half], batch.samples[half:]):
                self._evaluate(self.collate(part))
        else:
            self.record([failed.outcome()])
            if failed.cause == MEMORY:
                raise DoesNotFit(failed.sample["id"])
