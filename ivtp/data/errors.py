"""The error of every data set, and errors of libraries in one line."""

from __future__ import annotations

from ivtp.registry import UserError


class DataError(UserError):
    """A sample or data set that cannot be used; the message names it."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, with its kind unless it is ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
