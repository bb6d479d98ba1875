"""Samples that cannot be evaluated: which errors are a sample's own, and what is recorded of them.

A sample's own error is recorded in place of its answer, and the run goes on. Everything else ends the run: what the user
asked for and cannot have (UserError), and errors of the program itself (PROGRAMMING), which must not be hidden.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset, Subset

from ivtp.data.errors import DataError
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


@dataclass(frozen=True)
class Failed:
    """A sample without a result.

    sample  its texts: id, question, answer, family; image_id where it is known
    cause   one of the above, by which failures are counted
    reason  the error in one line; where: the file and line that raised it
    """

    sample: dict
    cause: str
    reason: str
    where: str | None = None

    def outcome(self, prediction: str | None = None) -> dict:
        """The outcome in place of an answer: the fields of one, all unknown, and `failed`, `cause`, `where`."""
        sample = self.sample
        unknown = ("correct", "early", "early_correct", "kept", "hit", "share", "words")
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


def own(error: BaseException) -> bool:
    """Whether an error is about the sample that was worked on."""
    if isinstance(error, UserError):
        return isinstance(error, DataError)
    return isinstance(error, Exception) and not isinstance(error, PROGRAMMING)


def failure(sample: dict, error: BaseException, cause: str) -> Failed:
    """The failure that an error of a sample's own is recorded as; any other error is raised again."""
    if not own(error):
        raise error
    said = str(error).removeprefix(f"sample {sample['id']!r}: ")  # it stands beside its name
    said = shortened(one_line(" ".join(said.split())), 400)
    name = type(error).__name__
    reason = said if isinstance(error, ValueError) and said else f"{name}: {said}" if said else name
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else None
    return Failed(sample, cause, reason, where)


def texts(data: Dataset, place: int) -> dict:
    """The texts of a sample whose images may be unreadable, by the data set's own `texts(place)` or `sketch(place)`."""
    while isinstance(data, Subset):
        data, place = data.dataset, data.indices[place]
    known = {"id": f"sample {place}", "question": "", "answer": "", "family": "all"}
    if hasattr(data, "texts"):
        return known | data.texts(place)
    return known | (data.sketch(place)[0] if hasattr(data, "sketch") else {})


def read(data: Dataset, place: int) -> dict | Failed:
    """One sample, or why it cannot be read."""
    try:
        return data[place]
    except Exception as error:
        return failure(texts(data, place), error, READING)


class Readable(Dataset):
    """The samples of some places, and in place of those that cannot be read `Failed`."""

    def __init__(self, data: Dataset, places: list[int] | range) -> None:
        self.data, self.places = data, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> dict | Failed:
        return read(self.data, self.places[number])


def answered(outcomes: list[dict]) -> list[dict]:
    """The outcomes of samples that did not fail: all numbers are about them."""
    return [outcome for outcome in outcomes if "failed" not in outcome]


def failures(outcomes: list[dict]) -> list[dict]:
    return [outcome for outcome in outcomes if "failed" in outcome]
