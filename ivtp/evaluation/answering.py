"""Answer questions with a pruned model: a LightningModule for testing only."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from ivtp.api import Pruning
from ivtp.backbones.family import PruneOptions
from ivtp.backbones.text.pairing import crop_limit_of
from ivtp.backbones.vlm.trace import Trace
from ivtp.core.loop import Kept
from ivtp.core.plan import Plan
from ivtp.data.answers import exact, normalise
from ivtp.data.batches import Batch, images_of
from ivtp.data.failures import NOT_FINITE, SCORING, Failed, failure
from ivtp.evaluation.isolated import Isolated
from ivtp.lmms.judges import JudgeError
from ivtp.pruners.planner import Planner
from ivtp.registry import UserError

JUDGE_FAILURES = 8
"""Answers in a row that the judge fails to grade before the run ends: it is down."""


class FiniteLogits(LogitsProcessor):
    """Detector of NaN or infinite logits during `generate`; changes none.

    failed  "b", True for prompts whose logits were not finite before the answer ended
    """

    def __init__(self, model: Any, prompt: int) -> None:
        end = model.generation_config.eos_token_id
        self.end = torch.tensor([] if end is None else end, dtype=torch.long, device=model.device).view(-1)
        self.prompt, self.failed = prompt, torch.zeros((), dtype=torch.bool, device=model.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Check the logits `scores` and return them unchanged."""
        # The maximum of a row is NaN if any is, and infinite if any is or all are.
        ended = torch.isin(input_ids[:, self.prompt :], self.end).any(1)
        self.failed = self.failed | (~scores.amax(-1).isfinite() & ~ended)
        return scores


def respond(
    model: Any,
    processor,
    pruner: Any,
    batch: Batch,
    generation: Mapping,
    vision_batch: int | None = None,
    compile: str | Mapping | None = None,
    **options,
):
    """Answer greedily under a plan: texts, generated tokens "b t", finiteness of each prompt's logits "b", and the run.

    model       a vision-language model of transformers
    pruner      a plan, or the planner that makes one for the images of each prompt
    generation  settings of `generate`
    vision_batch, compile  settings of the run: see `PrunedModel`
    options     fields of `PruneOptions`
    """
    questions = [sample["question"] for sample in batch.samples]
    prompt = batch.inputs["input_ids"].shape[1]
    detector = FiniteLogits(model, prompt)
    with Pruning(model, pruner, {}, PruneOptions(instruction=questions, **options)) as run:
        run.vision_batch = vision_batch
        if compile is not None:
            run.compile(compile)
        processors = LogitsProcessorList([detector])
        tokens = model.generate(**batch.inputs, **generation, do_sample=False, logits_processor=processors)
    tokens = tokens[:, prompt:]
    finite = ~detector.failed.view(len(questions), -1).any(1)  # over beams
    return processor.batch_decode(tokens, skip_special_tokens=True), tokens, finite, run


class Answer(Isolated):
    """Answer every question under a plan; each `test_step` returns the outcomes of its samples.

    An outcome is a dict: id, image, family, question; difficulty, if the data set states it; answer, prediction, correct
    and the scorer's other fields; early (the answer read out after part 1), early_correct, kept (patch indices after the
    last cut), target_hit (some kept token lies on the target patches), target_share (of kept tokens there), words (of the
    instruction, with their relevance); of samples whose id is in `watch` also lived (see `cuts_survived`); where crops are
    limited, fewer_crops (images that the checkpoint would have cut into more). For a sample without an answer see `Failed`.

    generation  settings of `generate`
    scorer      (sample, text) → fields of an outcome: see `ivtp.data.answers.Scorer`
    options     of `respond`
    """

    def __init__(
        self,
        model: nn.Module,
        processor,
        pruner: Plan | Planner,
        *,
        generation: Mapping | None = None,
        scorer: Callable[[dict, str], dict] = exact,
        watch: Collection[str] = (),
        collate: Callable[[list[dict]], Batch] | None = None,
        **options,
    ) -> None:
        super().__init__(collate)
        # Not a submodule: Lightning must not move, save or train the frozen model.
        self._model = [model]
        self.processor, self.pruner = processor, pruner
        self.plan = pruner.outline if isinstance(pruner, Planner) else pruner
        self.by_image = isinstance(pruner, Planner) and pruner.shape.by_image
        self.generation = dict(generation or {"max_new_tokens": 16})
        self.scorer, self.watch, self.options = scorer, watch, options
        self.judge_failures = 0

    @property
    def model(self) -> nn.Module:
        """The frozen model."""
        return self._model[0]

    def outcomes(self, batch: Batch) -> list[dict]:
        """One outcome per sample."""
        start = time.perf_counter()
        options: dict[str, Any] = self.options | {"read_early": True}
        if self.plan.reads_target:
            options["target_patches"] = torch.stack([sample["patches"] for sample in batch.samples])
        texts, tokens, finite, run = respond(self.model, self.processor, self.pruner, batch, self.generation, **options)
        finite = finite.tolist()
        self.seconds += time.perf_counter() - start
        first = self.processor.batch_decode(tokens[:, :1], skip_special_tokens=True)
        early = self.processor.batch_decode(run.trace.early.argmax(-1, keepdim=True), skip_special_tokens=True)
        kept = run.trace.kept
        words: list[Any] = run.trace.words or [None] * len(texts)
        outcomes, limit = [], crop_limit_of(self.model)
        for i, sample in enumerate(batch.samples):
            if not finite[i]:
                outcomes.append(not_finite(sample, run.trace.early.dtype).outcome())
                continue
            score, images = self._score(sample, texts[i]), images_of(sample)
            if isinstance(score, Failed):
                outcomes.append(score.outcome(texts[i].strip()))
                continue
            if self.by_image:
                left = token_counts(run.trace, i)
            else:
                left = kept_patches(kept if images else None, i, sample["patches"])
            outcome = {
                "id": sample["id"],
                "image": sample.get("image_id", sample["id"]),
                "family": sample["family"],
                "question": sample["question"],
                **({"difficulty": sample["difficulty"]} if "difficulty" in sample else {}),
                **score,
                "early": normalise(early[i]),
                "early_correct": self._early_correct(sample, score, early[i], first[i]),
                **left,
                "words": words[i] and [[word, round(relevance, 4)] for word, relevance in words[i]],
            }
            if limit is not None:
                outcome["fewer_crops"] = limit.affected([image.size for image in images])
            if sample["id"] in self.watch:
                # The tower's rows are images, the language model's are prompts.
                before = sum(len(images_of(other)) for other in batch.samples[:i])
                cuts = [*((cut, before) for cut in run.trace.vision), *((cut, i) for cut in run.trace.language)]
                outcome["lived"] = cuts_survived(cuts, len(sample["patches"]))
            outcomes.append(outcome)
        return outcomes

    def _score(self, sample: dict, text: str) -> dict | Failed:
        """Score an answer, or return its failure; raises UserError for a judge that fails again and again."""
        try:
            score = self.scorer(sample, text)
        except Exception as error:
            self.judge_failures += isinstance(error, JudgeError)
            if self.judge_failures >= JUDGE_FAILURES:
                raise UserError(f"{error}; the same command goes on from here") from error
            if self.collate is None:
                raise
            return failure(sample, error, SCORING)
        self.judge_failures = 0
        return score

    def _early_correct(self, sample: dict, score: dict, early: str, first: str) -> bool | float | None:
        """Correctness of the answer after part 1. Only its first token is read out there: it counts where it equals the
        first token of the whole model's answer and that answer is correct."""
        if self.generation["max_new_tokens"] == 1:
            early_score = self._score(sample, early)
            return None if isinstance(early_score, Failed) else early_score["correct"]
        correct = score["correct"]
        return correct if correct is None or normalise(early) == normalise(first) else type(correct)()


def not_finite(sample: dict, dtype: torch.dtype) -> Failed:
    """Failure of a sample whose logits are NaN or infinite, so that there is no answer to score."""
    name = str(dtype).removeprefix("torch.")
    fix = "look for values that are not finite in the weights"
    if dtype == torch.float16:
        fix = "they may be too large for it: use model.dtype=bfloat16 or float32"
    return Failed(sample, NOT_FINITE, f"logits are NaN or infinite in {name}; {fix}")


def token_counts(trace: Trace, sample: int) -> dict:
    """Numbers of visual tokens of one prompt before and after the cuts, for models whose images have several sizes.

    "left" lists the tokens that stay by their index among the prompt's visual tokens; there is no common grid of patches.
    """
    assert trace.visual is not None
    before, kept = int(trace.visual[sample]), trace.kept
    left = None if kept is None or not before else kept.of(sample).tolist()
    after = before if left is None else len(left)
    return {
        "kept": None,
        "target_hit": None,
        "target_share": None,
        "left": left,
        "visual_tokens": before,
        "tokens_left": after,
    }


def kept_patches(kept: Kept | None, sample: int, targets: torch.Tensor) -> dict:
    """Patches of one image that the last cut kept, and their overlap with the target patches.

    None where there was no cut, or there are no target patches.
    """
    if kept is None:
        return {"kept": None, "target_hit": None, "target_share": None}
    positions, overlap = kept.of(sample).cpu(), {"target_hit": None, "target_share": None}
    if targets.any():  # which are those of one image; a sample of several has none
        on_target = targets[positions].float()
        overlap = {"target_hit": bool(on_target.any()), "target_share": float(on_target.mean())}
    return {"kept": positions.tolist(), **overlap}


def cuts_survived(cuts: Iterable[tuple[Kept, int]], patches: int) -> str:
    """Number of cuts that each patch of one image survived, a character per patch: "0" none, "1" one, … in Unicode's order.

    A cut never brings a token back, so these numbers say which patches every cut kept.

    cuts  each with the row of this image in it
    """
    counts = [0] * patches
    for number, (cut, row) in enumerate(cuts, start=1):
        for patch in cut.of(row).tolist():
            counts[patch] = number
    return "".join(chr(ord("0") + count) for count in counts)
