"""What an lmms-eval task asks of `generate`, in the words of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ivtp.data.questions import DataError

PASSED = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
DEFAULT_NEW_TOKENS = 1024
"""Where a task says nothing; so do lmms-eval's own LLaVA models."""


def settings(asked: Mapping) -> dict:
    """Settings of a `generate` that does not sample: of what a task asks, all that then has a meaning.

    Raises DataError for a task that samples: its answers would depend on the batch, and no two rows could be compared.
    """
    if asked.get("do_sample", float(asked.get("temperature") or 0) > 0):
        raise DataError(
            f"the task samples its answers (temperature={asked.get('temperature')}), which makes them depend on the batch; "
            "ask for do_sample=false: data.generation={do_sample: false}, or --gen_kwargs do_sample=False of lmms-eval"
        )
    found = {name: asked[name] for name in PASSED if asked.get(name) is not None}
    return {"max_new_tokens": DEFAULT_NEW_TOKENS, **found}


def stops(asked: Mapping) -> list[str]:
    """Texts that end an answer. Not the empty line, which lmms-eval gives every task that names none: as its own models
    do, or every answer would be cut after its first paragraph."""
    until = asked.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text and text != "\n\n"]


def cut(text: str, until: Sequence[str]) -> str:
    """The answer before the first text that ends it."""
    for stop in until:
        text = text.split(stop)[0]
    return text
