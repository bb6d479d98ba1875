"""Score an answer by its text: normalise it, compare it with the accepted answers, give credit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import mean

from ivtp.registry import UnknownName, UserError, unknown

MATCHES = ("exact", "vqa", "contains")
CREDITS = ("any", "vqa")
ANNOTATORS = 4
"""The fewest answers with which VQA accuracy can reach 1: three matches beside the answer that is left out."""


def normalise(text: str) -> str:
    """Answers are compared without case, surrounding space and a final full stop."""
    return text.strip().rstrip(".").strip().lower()


@cache
def vqa_normaliser() -> Callable[[str], str]:
    """The normalisation of VQAv2's official evaluation (articles, punctuation, number words, contractions), as lmms-eval
    has it. Raises UserError without lmms-eval."""
    found = find_spec("lmms_eval")
    if found is None:
        raise UserError('data.match=vqa takes its normalisation from lmms-eval; pip install "ivtp[lmms]"')
    # This one file, which needs nothing else: importing the package takes seconds and sets up logging.
    path = Path(found.submodule_search_locations[0], "tasks", "_task_utils", "vqa_eval_metric.py")
    spec = spec_from_file_location("ivtp_vqa_eval_metric", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    processor = module.EvalAIAnswerProcessor()

    def normalised(text: str) -> str:
        text = text.replace("\n", " ").replace("\t", " ").strip()
        return processor.process_digit_article(processor.process_punctuation(text))

    return normalised


@dataclass(frozen=True)
class Scorer:
    """Sample and answer → `answer` (the accepted ones), `prediction` (both normalised) and `correct` of an outcome.

    match    exact: the same text after `normalise`; vqa: the same after VQAv2's normalisation; contains: the accepted
             answer stands in the model's as whole words, after `normalise` (for models that answer in sentences)
    answers  what several accepted answers (`answers` of a sample) are worth. any: 1 if one of them matches; vqa: VQA
             accuracy, min(matches / 3, 1) over the answers of the other annotators, averaged over annotators

    `correct` is None for a sample without an accepted answer.
    """

    match: str = "exact"
    answers: str = "any"

    def __post_init__(self) -> None:
        for key, value, known in (("match", self.match, MATCHES), ("answers", self.answers, CREDITS)):
            if value not in known:
                raise UnknownName(unknown(f"value of data.{key}:", str(value), known))
        self.normalise("")  # a missing library is reported before work starts

    def normalise(self, text: str) -> str:
        return vqa_normaliser()(text) if self.match == "vqa" else normalise(text)

    def matches(self, prediction: str, accepted: str) -> bool:
        if self.match == "contains" and accepted:
            return re.search(rf"(?<!\w){re.escape(accepted)}(?!\w)", prediction) is not None
        return prediction == accepted

    def __call__(self, sample: dict, text: str) -> dict:
        prediction = self.normalise(text)
        accepted = [self.normalise(answer) for answer in sample.get("answers", [sample["answer"]])]
        found = [self.matches(prediction, answer) for answer in accepted]
        correct: bool | float | None = None
        if found and self.answers == "any":
            correct = any(found)
        elif found:
            correct = mean(min((sum(found) - one) / 3, 1) for one in found)
            correct = bool(correct) if correct in (0, 1) else correct
        return {"answer": " | ".join(dict.fromkeys(accepted)), "prediction": prediction, "correct": correct}


exact = Scorer()
"""The scorer of a data set without a `judge` of its own."""
