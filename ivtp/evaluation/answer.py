"""A LightningModule that answers questions with a pruned model, and never trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import lightning as L
import torch
from torch import nn
from torchmetrics import MeanMetric

from ivtp.backbones.shared import SharedVision
from ivtp.data.batches import Batch
from ivtp.models import prune
from ivtp.pruning.pruner import Plan
from ivtp.pruning.traverse import Kept


def normalise(text: str) -> str:
    """Answers are compared without case, surrounding space and a final full stop."""
    return text.strip().rstrip(".").strip().lower()


class Answer(L.LightningModule):
    """Answers every question under `plan` and hands each sample's outcome to `record`, batch by batch.

    An outcome is a dict: id, image, family, answer, prediction, correct, early (the answer read out after part 1),
    early_correct, kept (patch indices after the last cut), hit (some kept token lies on what was asked about), share
    (of kept tokens there), words (of the instruction, with their relevance); of samples whose id is in `watch` also
    lived (see there).
    """

    def __init__(
        self,
        model: nn.Module,
        processor,
        plan: Plan,
        record: Callable[[list[dict]], None],
        max_new_tokens: int = 16,
        watch: Collection[str] = (),
        shared: SharedVision | None = None,
        part: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        super().__init__()
        # Not a submodule: Lightning must not move, save or train what it only looks through.
        self._model = [model]
        self.processor, self.plan, self.record, self.max_new_tokens = processor, plan, record, max_new_tokens
        self.watch, self.shared, self.part = watch, shared, part
        self.accuracy = MeanMetric()
        self.seconds = 0.0

    @property
    def model(self) -> nn.Module:
        return self._model[0]

    def training_step(self, *_):
        raise RuntimeError("ivtp evaluates frozen models and trains nothing; use Trainer.test(module, datamodule=...)")

    configure_optimizers = training_step

    @torch.inference_mode()
    def test_step(self, batch: Batch, index: int) -> None:
        questions = [sample["question"] for sample in batch.samples]
        start = time.perf_counter()
        more = {"shared": self.shared, "part": self.part}
        if self.plan.reads_truth:
            more["truth"] = torch.stack([sample["patches"] for sample in batch.samples])
        with prune(self.model, self.plan, instruction=questions, read_early=True, **more) as run:
            tokens = self.model.generate(**batch.inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        self.seconds += time.perf_counter() - start
        length = batch.inputs["input_ids"].shape[1]
        texts = self.processor.batch_decode(tokens[:, length:], skip_special_tokens=True)
        first = self.processor.batch_decode(tokens[:, length : length + 1], skip_special_tokens=True)
        early = self.processor.batch_decode(run.trace.early.argmax(-1, keepdim=True), skip_special_tokens=True)
        outcomes = []
        for i, sample in enumerate(batch.samples):
            prediction, answer = normalise(texts[i]), normalise(sample["answer"])
            outcomes.append(
                {
                    "id": sample["id"],
                    "image": sample.get("image_id", sample["id"]),
                    "family": sample["family"],
                    "question": sample["question"],
                    "answer": answer,
                    "prediction": prediction,
                    "correct": prediction == answer,
                    # After part 1 only the answer's first token is read out: it counts where that token is the one
                    # that the whole model starts a correct answer with.
                    "early": normalise(early[i]),
                    "early_correct": prediction == answer and normalise(early[i]) == normalise(first[i])
                    if self.max_new_tokens > 1
                    else normalise(early[i]) == answer,
                    **seen(run.trace.kept, i, sample["patches"]),
                    "words": run.trace.words and [[word, round(score, 4)] for word, score in run.trace.words[i]],
                }
            )
            if sample["id"] in self.watch:
                cuts = [*run.trace.vision, *run.trace.language]
                outcomes[-1]["lived"] = lived(cuts, i, len(sample["patches"]))
            self.accuracy.update(float(outcomes[-1]["correct"]))
        self.record(outcomes)

    def on_test_epoch_end(self) -> None:
        self.log("accuracy", self.accuracy)


def seen(kept: Kept | None, sample: int, asked: torch.Tensor) -> dict:
    """What the last cut left of one image, and of the patches asked about (None: nothing was cut or asked)."""
    if kept is None:
        return {"kept": None, "hit": None, "share": None}
    positions = kept.position[sample][kept.valid[sample]].cpu()
    if not asked.any():
        return {"kept": positions.tolist(), "hit": None, "share": None}
    on = asked[positions]
    return {"kept": positions.tolist(), "hit": bool(on.any()), "share": float(on.float().mean())}


def lived(cuts: Sequence[Kept], sample: int, patches: int) -> str:
    """How many cuts each patch of one image lived through, a character per patch: "0" none, "1" one, and so on in
    Unicode's order. A cut never brings a token back, so this says what every cut kept."""
    counts = [0] * patches
    for number, cut in enumerate(cuts, start=1):
        for patch in cut.position[sample][cut.valid[sample]].tolist():
            counts[patch] = number
    return "".join(chr(ord("0") + count) for count in counts)
