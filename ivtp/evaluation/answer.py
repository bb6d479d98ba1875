"""A LightningModule that answers questions with a pruned model, and never trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import LogitsProcessor, LogitsProcessorList

from ivtp.backbones.companions import crop_limit_of
from ivtp.backbones.shared import SharedVision
from ivtp.backbones.trace import Trace
from ivtp.data.answers import exact, normalise
from ivtp.data.batches import Batch, pictures
from ivtp.data.failures import NOT_FINITE, SCORING, Failed, failure
from ivtp.data.judges import JudgeError
from ivtp.evaluation.isolated import Isolated
from ivtp.models import prune
from ivtp.pruners.planner import Planner
from ivtp.pruning.pruner import Plan
from ivtp.pruning.traverse import Kept
from ivtp.registry import UserError

JUDGE_FAILURES = 8
"""So many answers in a row that the judge fails on, and the run ends: it is down."""


class FiniteLogits(LogitsProcessor):
    """Watches the logits that `generate` reads, and changes none: `failed` "b", those that were NaN or infinite before
    the answer ended."""

    def __init__(self, model: nn.Module, prompt: int) -> None:
        end = model.generation_config.eos_token_id
        self.end = torch.tensor([] if end is None else end, dtype=torch.long, device=model.device).view(-1)
        self.prompt, self.failed = prompt, torch.zeros((), dtype=torch.bool, device=model.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The maximum of a row is NaN if any is, and infinite if any is or all are.
        ended = torch.isin(input_ids[:, self.prompt :], self.end).any(1)
        self.failed = self.failed | (~scores.amax(-1).isfinite() & ~ended)
        return scores


def respond(
    model: nn.Module,
    processor,
    pruner: Plan | Planner,
    batch: Batch,
    generation: Mapping,
    vision_batch: int | None = None,
    compile: str | Mapping | None = None,
    **more,
):
    """Answer greedily under a plan: texts, generated tokens "b t", whether all logits of each were finite
    "b", and the run.

    pruner      a plan, or what makes one for the images of each prompt
    generation  settings of `generate`; more: of `prune`
    vision_batch, compile  of the run: see `PrunedModel`
    """
    questions = [sample["question"] for sample in batch.samples]
    prompt = batch.inputs["input_ids"].shape[1]
    logits = FiniteLogits(model, prompt)
    with prune(model, pruner, instruction=questions, **more) as run:
        run.vision_batch = vision_batch
        if compile is not None:
            run.compile(compile)
        watching = LogitsProcessorList([logits])
        tokens = model.generate(**batch.inputs, **generation, do_sample=False, logits_processor=watching)
    tokens = tokens[:, prompt:]
    beams = logits.failed.view(len(questions), -1)
    return processor.batch_decode(tokens, skip_special_tokens=True), tokens, ~beams.any(1), run


class Answer(Isolated):
    """Answers every question under a plan and hands each sample's outcome to `record`, batch by batch. Never trains.

    An outcome is a dict: id, image, family, question; difficulty, if the data set states it; answer, prediction, correct
    and what else `judge` says; early (the answer read out after part 1), early_correct, kept (patch indices after the last
    cut), hit (some kept token lies on what was asked about), share (of kept tokens there), words (of the instruction, with
    their relevance); of samples whose id is in `watch` also lived (see there); where crops are limited, fewer_crops (images
    that the checkpoint would have cut into more). That of a sample without an answer: see `Failed`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor,
        pruner: Plan | Planner,
        record: Callable[[list[dict]], None],
        max_new_tokens: int = 16,
        watch: Collection[str] = (),
        shared: SharedVision | None = None,
        part: Callable[[str], AbstractContextManager] = nullcontext,
        judge: Callable[[dict, str], dict] = exact,
        generation: Mapping | None = None,
        vision_batch: int | None = None,
        compile: str | Mapping | None = None,
        collate: Callable[[list[dict]], Batch] | None = None,
    ) -> None:
        super().__init__(record, collate)
        # Not a submodule: Lightning must not move, save or train what it only looks through.
        self._model = [model]
        self.processor, self.pruner = processor, pruner
        self.plan = pruner.outline if isinstance(pruner, Planner) else pruner
        self.watch, self.shared, self.part, self.judge = watch, shared, part, judge
        self.by_image = isinstance(pruner, Planner) and pruner.shape.by_image
        self.generation = {"max_new_tokens": max_new_tokens, **(generation or {})}
        self.vision_batch, self.compiling = vision_batch, compile
        self.accuracy = MeanMetric()
        self.judge_failures = 0

    @property
    def model(self) -> nn.Module:
        return self._model[0]

    def outcomes(self, batch: Batch) -> list[dict]:
        start = time.perf_counter()
        more = {"shared": self.shared, "part": self.part, "read_early": True}
        more |= {"vision_batch": self.vision_batch, "compile": self.compiling}
        if self.plan.reads_truth:
            more["truth"] = torch.stack([sample["patches"] for sample in batch.samples])
        texts, tokens, finite, run = respond(self.model, self.processor, self.pruner, batch, self.generation, **more)
        finite = finite.tolist()
        self.seconds += time.perf_counter() - start
        first = self.processor.batch_decode(tokens[:, :1], skip_special_tokens=True)
        early = self.processor.batch_decode(run.trace.early.argmax(-1, keepdim=True), skip_special_tokens=True)
        kept = run.trace.kept
        rated, outcomes, limit = run.trace.words or [None] * len(texts), [], crop_limit_of(self.model)
        for i, sample in enumerate(batch.samples):
            if not finite[i]:
                outcomes.append(not_finite(sample, run.trace.early.dtype).outcome())
                continue
            judged = self._judged(sample, texts[i])
            if isinstance(judged, Failed):
                outcomes.append(judged.outcome(texts[i].strip()))
                continue
            outcomes.append(
                {
                    "id": sample["id"],
                    "image": sample.get("image_id", sample["id"]),
                    "family": sample["family"],
                    "question": sample["question"],
                    **({"difficulty": sample["difficulty"]} if "difficulty" in sample else {}),
                    **judged,
                    "early": normalise(early[i]),
                    "early_correct": self.early(sample, judged, early[i], first[i]),
                    **(
                        counted(run.trace, i)
                        if self.by_image
                        else seen(kept if pictures(sample) else None, i, sample["patches"])
                    ),
                    "words": rated[i] and [[word, round(score, 4)] for word, score in rated[i]],
                }
            )
            if limit is not None:
                outcomes[-1]["fewer_crops"] = limit.affected([image.size for image in pictures(sample)])
            if sample["id"] in self.watch:
                # The tower's rows are images, the language model's are prompts.
                before = sum(len(pictures(other)) for other in batch.samples[:i])
                cuts = [*((cut, before) for cut in run.trace.vision), *((cut, i) for cut in run.trace.language)]
                outcomes[-1]["lived"] = lived(cuts, len(sample["patches"]))
        for outcome in outcomes:
            if outcome["correct"] is not None:
                self.accuracy.update(float(outcome["correct"]))
        return outcomes

    def _judged(self, sample: dict, text: str) -> dict | Failed:
        """Score of an answer, or its failure if it cannot be scored; raises UserError for a judge that fails again and again."""
        try:
            judged = self.judge(sample, text)
        except Exception as error:
            self.judge_failures += isinstance(error, JudgeError)
            if self.judge_failures >= JUDGE_FAILURES:
                raise UserError(f"{error}; the same command goes on from here") from error
            if self.collate is None:
                raise
            return failure(sample, error, SCORING)
        self.judge_failures = 0
        return judged

    def early(self, sample: dict, judged: dict, early: str, first: str) -> bool | float | None:
        """Whether the answer was right after part 1. Only its first token is read out there: it counts where that token
        is the one that the whole model starts a correct answer with."""
        if self.generation["max_new_tokens"] == 1:
            judged = self._judged(sample, early)
            return None if isinstance(judged, Failed) else judged["correct"]
        correct = judged["correct"]
        return correct if correct is None or normalise(early) == normalise(first) else type(correct)()

    def on_test_epoch_end(self) -> None:
        if self.accuracy.update_count:
            self.log("accuracy", self.accuracy)


def not_finite(sample: dict, dtype: torch.dtype) -> Failed:
    """The failure of a sample whose logits are NaN or infinite, so that there is no answer to score."""
    name = str(dtype).removeprefix("torch.")
    fix = "look for values that are not finite in the weights"
    if dtype == torch.float16:
        fix = "they may be too large for it: use model.dtype=bfloat16 or float32"
    return Failed(sample, NOT_FINITE, f"logits are NaN or infinite in {name}; {fix}")


def counted(trace: Trace, sample: int) -> dict:
    """Where images have other sizes: how many visual tokens a prompt had and how many are left, and which ("left", by
    their numbers among its visual tokens); patches that could be drawn in a common grid there are none."""
    before, kept = int(trace.visual[sample]), trace.kept
    left = None if kept is None or not before else kept.position[sample][kept.valid[sample]].tolist()
    after = before if left is None else len(left)
    return {"kept": None, "hit": None, "share": None, "left": left, "visual_tokens": before, "tokens_left": after}


def seen(kept: Kept | None, sample: int, asked: torch.Tensor) -> dict:
    """What the last cut left of one image, and of the patches asked about (None: nothing was cut or asked)."""
    if kept is None:
        return {"kept": None, "hit": None, "share": None}
    positions = kept.position[sample][kept.valid[sample]].cpu()
    if not asked.any():
        return {"kept": positions.tolist(), "hit": None, "share": None}
    on = asked[positions]
    return {"kept": positions.tolist(), "hit": bool(on.any()), "share": float(on.float().mean())}


def lived(cuts: Iterable[tuple[Kept, int]], patches: int) -> str:
    """How many cuts (each with the row that is this image's) each patch of one image lived through, a character per patch:
    "0" none, "1" one, and so on in Unicode's order. A cut never brings a token back, so this says what every cut kept."""
    counts = [0] * patches
    for number, (cut, row) in enumerate(cuts, start=1):
        for patch in cut.position[row][cut.valid[row]].tolist():
            counts[patch] = number
    return "".join(chr(ord("0") + count) for count in counts)
