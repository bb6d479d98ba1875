"""Score an answer by its text: normalise it, compare it with the accepted answers, give credit."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from types import ModuleType

from ivtp.registry import UnknownName, UserError, unknown

MATCHES = ("exact", "vqa", "contains")
CREDITS = ("any", "vqa")
ANNOTATORS = 4
"""Least number of answers with which VQA accuracy can reach 1: three matches beside the answer that is left out."""


def normalise(text: str) -> str:
    """Remove case, surrounding space and a final full stop."""
    return text.strip().rstrip(".").strip().lower()


@cache
def vqa_normaliser() -> Callable[[str], str]:
    """Load the normalisation of VQAv2's official evaluation (articles, punctuation, number words, contractions) from lmms-eval.

    Raises UserError without lmms-eval.
    """
    package = find_spec("lmms_eval")
    if package is None or not package.submodule_search_locations:
        raise UserError('data.match=vqa takes its normalisation from lmms-eval; pip install "ivtp[lmms]"')
    # This one file, which needs nothing else: importing the package takes seconds and sets up logging.
    path = Path(package.submodule_search_locations[0], "tasks", "_task_utils", "vqa_eval_metric.py")
    loader = SourceFileLoader("ivtp_vqa_eval_metric", str(path))
    module = ModuleType(loader.name)
    loader.exec_module(module)
    processor = module.EvalAIAnswerProcessor()

    def normalised(text: str) -> str:
        text = text.replace("\n", " ").replace("\t", " ").strip()
        return processor.process_digit_article(processor.process_punctuation(text))

    return normalised


@dataclass(frozen=True)
class Scorer:
    """Scorer of answers: (sample, text) → `answer` (the accepted ones), `prediction` and `correct` of an outcome.

    match    exact: equal texts after `normalise`; vqa: equal texts after VQAv2's normalisation; contains: the model's answer
             contains the accepted one as whole words, after `normalise` (for models that answer in sentences)
    answers  credit for several accepted answers (`answers` of a sample). any: 1 if one of them matches; vqa: VQA accuracy,
             min(matches / 3, 1) over the answers of the other annotators, averaged over annotators

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
        """Normalise an answer by the rule of `match`."""
        return vqa_normaliser()(text) if self.match == "vqa" else normalise(text)

    def matches(self, prediction: str, accepted: str) -> bool:
        """Compare two normalised answers by the rule of `match`."""
        if self.match == "contains" and accepted:
            return re.search(rf"(?<!\w){re.escape(accepted)}(?!\w)", prediction) is not None
        return prediction == accepted

    def __call__(self, sample: dict, text: str) -> dict:
        """Score the answer `text`."""
        prediction = self.normalise(text)
        accepted = [self.normalise(answer) for answer in sample.get("answers", [sample["answer"]])]
        matches = [self.matches(prediction, answer) for answer in accepted]
        correct: bool | float | None = None
        if matches and self.answers == "any":
            correct = any(matches)
        elif matches:
            correct = mean(min((sum(matches) - one) / 3, 1) for one in matches)
            correct = bool(correct) if correct in (0, 1) else correct
        return {"answer": " | ".join(dict.fromkeys(accepted)), "prediction": prediction, "correct": correct}


exact = Scorer()
"""Scorer of a data set without one of its own."""
