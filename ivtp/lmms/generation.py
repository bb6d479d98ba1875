"""Translate the generation settings of an lmms-eval task into those of transformers' `generate`."""

from collections.abc import Mapping, Sequence

from ivtp.data.failures import DataError

PASSED = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
DEFAULT_NEW_TOKENS = 1024
"""Default of a task without a limit, as in lmms-eval's own LLaVA models."""


def generation_settings(task: Mapping) -> dict:
    """Settings of a `generate` that does not sample: those of a task that then have a meaning.

    Raises DataError for a task that samples: its answers would depend on the batch, and rows could not be compared.
    """
    if task.get("do_sample", float(task.get("temperature") or 0) > 0):
        raise DataError(
            f"the task samples its answers (temperature={task.get('temperature')}), which makes them depend on the batch; "
            "ask for do_sample=false: data.generation={do_sample: false}, or --gen_kwargs do_sample=False of lmms-eval"
        )
    return {"max_new_tokens": DEFAULT_NEW_TOKENS} | {name: task[name] for name in PASSED if task.get(name) is not None}


def stop_texts(task: Mapping) -> list[str]:
    """Texts that end an answer.

    The empty line, lmms-eval's default for every task, is left out: as for its own models, or every answer would end after
    its first paragraph.
    """
    until = task.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text and text != "\n\n"]


def truncate(text: str, until: Sequence[str]) -> str:
    """Answer before the first text that ends it."""
    for stop in until:
        text = text.split(stop)[0]
    return text
