"""Samples that cannot be evaluated: errors of single samples, and their record.

The error of a sample is recorded in place of its answer, and the run goes on. All other errors end the run: requests that
cannot be met (UserError), and errors of the program itself (PROGRAMMING), which must not be hidden.
"""

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from ivtp.data.outcomes import Outcome
from ivtp.registry import UserError
from ivtp.text import one_line, shortened

PROGRAMMING = (NameError, AttributeError, TypeError, AssertionError, ImportError, NotImplementedError)
PACKAGE = Path(__file__).parent.parent

READING = "cannot be read"
PREPARING = "cannot be prepared"
ANSWERING = "cannot be answered"
SCORING = "cannot be scored"
MEMORY = "out of memory"
NOT_FINITE = "not finite"


class DataError(UserError):
    """Sample or data set that cannot be used; the message names it."""


@dataclass(frozen=True)
class Failed:
    """Sample without a result.

    sample  its texts: id, question, answer, family; image_id where it is known
    cause   one of the constants above, by which failures are counted
    reason  the error in one line
    where   file and line that raised the error
    """

    sample: dict
    cause: str
    reason: str
    where: str | None = None

    def outcome(self, prediction: str | None = None) -> Outcome:
        """Outcome of the sample: the fields of an answered one, all unknown, and `failed`, `cause`, `where`."""
        sample = self.sample
        unknown = ("correct", "early", "early_correct", "kept", "target_hit", "target_share", "words")
        return {
            "id": sample["id"],
            "image": sample.get("image_id", sample["id"]),
            "family": sample["family"],
            "question": shortened(sample["question"], 500),
            "answer": shortened(str(sample["answer"]), 500),
            "prediction": prediction,
            **dict.fromkeys(unknown),
            "failed": self.reason,
            "cause": self.cause,
            "where": self.where,
        }


def first_line(error: BaseException) -> str:
    """First line of an error's message, with the error's type unless it is a UserError."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def own(error: BaseException) -> bool:
    """True for an error of the sample in work, False for one that must end the run."""
    if isinstance(error, UserError):
        return isinstance(error, DataError)
    return isinstance(error, Exception) and not isinstance(error, PROGRAMMING)


def out_of_memory(error: BaseException) -> bool:
    """True for an error of insufficient memory: torch's own, or one that the CPU allocator, cuBLAS or cuDNN name in words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def failure(sample: dict, error: BaseException, cause: str) -> Failed:
    """Turn an error of a sample into its failure; raise any other error again."""
    if not own(error):
        error.add_note(f"sample {sample['id']!r} {cause}")
        raise error
    message = str(error).removeprefix(f"sample {sample['id']!r}: ")  # the record names the sample
    message = shortened(one_line(" ".join(message.split())), 400)
    name = type(error).__name__
    reason = message if isinstance(error, ValueError) and message else f"{name}: {message}" if message else name
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else None
    return Failed(sample, cause, reason, where)


def texts(data: Any, index: int) -> dict:
    """Texts of a sample whose images may be unreadable, by the data set's own `texts(index)` or `sketch(index)`."""
    while isinstance(data, Subset):
        data, index = data.dataset, data.indices[index]
    known = {"id": f"sample {index}", "question": "", "answer": "", "family": "all"}
    if texts_of := getattr(data, "texts", None):
        return known | texts_of(index)
    sketch = getattr(data, "sketch", None)
    return known | (sketch(index)[0] if sketch else {})


def read(data: Any, index: int) -> dict | Failed:
    """Read one sample; return its failure if that is impossible."""
    try:
        return data[index]
    except Exception as error:
        return failure(texts(data, index), error, READING)


def answered(outcomes: list[Outcome]) -> list[Outcome]:
    """Outcomes of samples that did not fail: the basis of all numbers."""
    return [outcome for outcome in outcomes if "failed" not in outcome]


def failures(outcomes: list[Outcome]) -> list[Outcome]:
    """Outcomes of samples that failed."""
    return [outcome for outcome in outcomes if "failed" in outcome]
