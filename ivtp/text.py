"""Escape characters in text from data that a terminal, a page or a file would interpret."""

from __future__ import annotations

import re

CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
"""Control characters but tab and line feed, and lone surrogates, which UTF-8 cannot encode."""
TURNING = r"\u2028\u2029\u202a-\u202e\u2066-\u2069"
"""Unicode line separators, and characters that change the direction of the following text."""
_UNPRINTABLE = re.compile(rf"[{CONTROLS}\u2028\u2029]")
_NOT_PLAIN = re.compile(f"[{CONTROLS}{TURNING}\t\n]")
_NOT_PLAIN_IN_JSON = re.compile(f"[{CONTROLS}{TURNING}]")


def _escape(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """Escape text for a page: control characters, line separators that Vega cannot read, and lone surrogates.

    The page isolates text directions itself.
    """
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """Escape text for a terminal or a cell of a table: one line, read from left to right."""
    return _NOT_PLAIN.sub(_escape, text)


def escaped(json: str) -> str:
    """Write these characters in JSON as JSON's own escapes, for any program that shows it or splits its lines."""
    return _NOT_PLAIN_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", json)


def shortened(text: str, most: int) -> str:
    """Shorten text to a number of characters, the last one an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def first_sentence(docstring: str | None) -> str:
    """First sentence of a docstring, on one line.

    >>> first_sentence("The frozen model, as it is. Nothing is cut.")
    'The frozen model, as it is.'
    """
    paragraph = (docstring or "").strip().split("\n\n")[0]
    return re.split(r"(?<=\w\w\.)(?<!\bal\.)\s(?=[A-Z`])", " ".join(paragraph.split()))[0]
