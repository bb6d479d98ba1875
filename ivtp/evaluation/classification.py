"""Classify images with a pruned encoder: a LightningModule for testing only."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

from torchmetrics import MeanMetric

from ivtp.api import prune
from ivtp.core.plan import Plan
from ivtp.data.batches import Batch
from ivtp.evaluation.answering import cuts_survived, kept_patches, not_finite
from ivtp.evaluation.isolated import Isolated

TOP = 5


class Classify(Isolated):
    """Classify every image under a plan; each `test_step` returns the outcomes of its samples.

    An outcome has the fields of an answer's (see `ivtp.evaluation.answering.Answer`), and top5: the right class is among
    the five likeliest (None for fewer than six classes). Nothing is read out early, and there are no words.
    """

    def __init__(
        self,
        encoder,
        classes: list[str],
        plan: Plan,
        watch: Collection[str] = (),
        part: Callable[[str], AbstractContextManager] = nullcontext,
        collate: Callable[[list[dict]], Batch] | None = None,
    ) -> None:
        super().__init__(collate)
        # Not a submodule: Lightning must not move, save or train the frozen model.
        self._encoder = [encoder]
        self.classes, self.plan, self.watch, self.part = classes, plan, watch, part
        self.top5 = MeanMetric() if len(classes) > TOP else None

    def outcomes(self, batch: Batch) -> list[dict]:
        """One outcome per sample."""
        encoder = self._encoder[0]
        start = time.perf_counter()
        with prune(encoder.model, self.plan, part=self.part) as run:
            logits = encoder.logits(batch.inputs["pixel_values"])
            ranked = logits.topk(min(TOP, len(self.classes))).indices.tolist()
            finite = logits.isfinite().all(-1).tolist()
        self.seconds += time.perf_counter() - start
        dtype = next(encoder.model.parameters()).dtype
        return [
            self._outcome(i, sample, ranked[i], run.vision) if good else not_finite(sample, dtype).outcome()
            for i, (sample, good) in enumerate(zip(batch.samples, finite, strict=True))
        ]

    def _outcome(self, i: int, sample: dict, ranked: list[int], cuts: list) -> dict:
        outcome = {
            "id": sample["id"],
            "image": sample["image_id"],
            "family": sample["family"],
            "question": sample["question"],
            "answer": sample["answer"],
            "prediction": self.classes[ranked[0]],
            "correct": ranked[0] == sample["label"],
            "top5": sample["label"] in ranked if self.top5 is not None else None,
            "early": None,
            "early_correct": None,
            **kept_patches(cuts[-1] if cuts else None, i, sample["patches"]),
            "words": None,
        }
        if sample["id"] in self.watch:
            outcome["lived"] = cuts_survived([(cut, i) for cut in cuts], len(sample["patches"]))
        return outcome
