"""Text from data on its way out: characters that a terminal, a page or a file would obey are shown as escapes."""

from __future__ import annotations

import re

CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
"""Control characters but tab and line feed, and lone surrogates, which UTF-8 cannot hold."""
TURNING = r"\u2028\u2029\u202a-\u202e\u2066-\u2069"
"""Unicode's own ends of lines, and what turns the direction of the text that follows."""
_UNPRINTABLE = re.compile(rf"[{CONTROLS}\u2028\u2029]")
_NOT_PLAIN = re.compile(f"[{CONTROLS}{TURNING}\t\n]")
_NOT_PLAIN_IN_JSON = re.compile(f"[{CONTROLS}{TURNING}]")


def _escape(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """The text for a page, which isolates directions itself: without control characters, ends of lines that Vega cannot
    read, and lone surrogates."""
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    """The text for a terminal or a cell of a table: one line, read from left to right, all else as escapes."""
    return _NOT_PLAIN.sub(_escape, text)


def escaped(json: str) -> str:
    """JSON with the same characters as JSON's own escapes, whatever program shows it or splits its lines."""
    return _NOT_PLAIN_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", json)


def shortened(text: str, most: int) -> str:
    """At most so many characters of the text."""
    return text if len(text) <= most else text[: most - 1] + "…"
