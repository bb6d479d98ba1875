"""Schema of an outcome: what is recorded of one sample."""

from typing import Any

Outcome = dict[str, Any]
"""Outcome of one sample under one row: a line of `outcomes/`.

id, image, family, question, answer  of the sample; `image` is its cluster in statistics
difficulty         level per name, if the data set states it
prediction         the answer as text
correct            bool, or a credit between 0 and 1; None: not scored alone
scores             of the benchmark task's own metrics
top5               the right class is among the five likeliest
early, early_correct  answer read out after part 1
kept               patches left by the last cut
target_hit, target_share  a kept patch is a target patch; the fraction of them that are
words              words of the instruction, with their relevance
lived              number of cuts that each patch survived, a character per patch
left, visual_tokens, tokens_left  tokens left where images differ in size; their number before and after
fewer_crops        images that the checkpoint would have cut into more crops
predictions        of several seeds that are drawn together
failed, cause, where  of a sample without a result
"""

FIELDS = frozenset(
    (
        "id",
        "image",
        "family",
        "question",
        "answer",
        "prediction",
        "correct",
        "early_correct",
        "target_hit",
        "target_share",
    )
)
"""Fields that every outcome has."""


def is_outcome(line: dict[str, Any]) -> bool:
    """True if a line of a file holds an outcome."""
    return line.keys() >= FIELDS and isinstance(line["id"], str) and isinstance(line["image"], str)
