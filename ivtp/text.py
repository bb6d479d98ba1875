"""Text from data on its way out: characters that a terminal, a page or a file would obey are shown as escapes."""

from __future__ import annotations

import re

CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
"""Control characters but tab and line feed, and lone surrogates, which UTF-8 cannot hold."""
_UNPRINTABLE = re.compile(f"[{CONTROLS}]")
# Beside them: all that ends a line, and what turns the direction of the text that follows.
_NOT_PLAIN = re.compile(f"[{CONTROLS}\t\n\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def _escape(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """The text for a page, which isolates directions itself: control characters and lone surrogates as escapes."""
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """The text for a terminal or a cell of a table: one line, read from left to right, all else as escapes."""
    return _NOT_PLAIN.sub(_escape, text)


def shortened(text: str, most: int) -> str:
    """At most so many characters of the text."""
    return text if len(text) <= most else text[: most - 1] + "…"
