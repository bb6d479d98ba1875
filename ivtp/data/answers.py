"""What an answer is worth where nothing but its text is known: the same words or not."""

from __future__ import annotations


def normalise(text: str) -> str:
    """Answers are compared without case, surrounding space and a final full stop."""
    return text.strip().rstrip(".").strip().lower()


def exact(sample: dict, text: str) -> dict:
    """What a data set without a `judge` of its own says of an answer: it is right if it is the sample's."""
    prediction, answer = normalise(text), normalise(sample["answer"])
    return {"answer": answer, "prediction": prediction, "correct": prediction == answer}
