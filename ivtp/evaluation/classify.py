"""A LightningModule that sorts images into classes with a pruned encoder, and never trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torchmetrics.classification import MulticlassAccuracy

from ivtp.data.batches import Batch
from ivtp.evaluation.answer import lived, not_finite, seen
from ivtp.evaluation.isolated import Isolated
from ivtp.models import prune
from ivtp.pruning.pruner import Plan

TOP = 5


class Classify(Isolated):
    """Sorts every image under `plan` and hands each sample's outcome to `record`, batch by batch. Never trains.

    An outcome has the fields of an answer's (see `ivtp.evaluation.answer.Answer`), and top5: whether the right class is
    among the five likeliest (None for fewer than six classes). Nothing is read out early, and there are no words.
    """

    def __init__(
        self,
        encoder,
        classes: list[str],
        plan: Plan,
        record: Callable[[list[dict]], None],
        watch: Collection[str] = (),
        part: Callable[[str], AbstractContextManager] = nullcontext,
        collate: Callable[[list[dict]], Batch] | None = None,
    ) -> None:
        super().__init__(record, collate)
        # Not a submodule: Lightning must not move, save or train what it only looks through.
        self._encoder = [encoder]
        self.classes, self.plan, self.watch, self.part = classes, plan, watch, part
        self.accuracy = MulticlassAccuracy(len(classes), average="micro")
        self.top5 = MulticlassAccuracy(len(classes), average="micro", top_k=TOP) if len(classes) > TOP else None

    def outcomes(self, batch: Batch) -> list[dict]:
        encoder = self._encoder[0]
        start = time.perf_counter()
        with prune(encoder.model, self.plan, part=self.part) as run:
            logits = encoder.logits(batch.inputs["pixel_values"])
            ranked = logits.topk(min(TOP, len(self.classes))).indices.tolist()
            finite = logits.isfinite().all(-1)
        self.seconds += time.perf_counter() - start
        labels = torch.tensor([sample["label"] for sample in batch.samples], device=logits.device)
        for metric in (self.accuracy, self.top5):
            if metric is not None and finite.any():
                metric.update(logits[finite], labels[finite])
        dtype = next(encoder.model.parameters()).dtype
        return [
            self._outcome(i, sample, ranked[i], run.vision) if good else not_finite(sample, dtype).outcome()
            for i, (sample, good) in enumerate(zip(batch.samples, finite.tolist(), strict=True))
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
            **seen(cuts[-1] if cuts else None, i, sample["patches"]),
            "words": None,
        }
        if sample["id"] in self.watch:
            outcome["lived"] = lived([(cut, i) for cut in cuts], len(sample["patches"]))
        return outcome

    def on_test_epoch_end(self) -> None:
        if not self.accuracy.update_count:
            return
        self.log("accuracy", self.accuracy)
        if self.top5 is not None:
            self.log("top5", self.top5)
