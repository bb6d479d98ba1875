"""Registry of functions by name, and the errors of the package."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TypeVar

T = TypeVar("T", bound=Callable)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line that names an unknown name, the most similar known one, and all that are known.

    >>> unknown("pruner", "ivpt", ["fastv", "ivtp"])
    "unknown pruner 'ivpt'. Did you mean 'ivtp'? Known: fastv, ivtp"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = f" Known: {', '.join(known)}" if len(known) <= 40 or not near else ""
    return f"unknown {kind} {name!r}.{hint}{listed}"


class UserError(ValueError):
    """A request that cannot be met: the message, one line, names the value, the bound and the fix."""


class RankLost(UserError):
    """Another process of the run has ended before its work was done."""


LAUNCHED = "ivtp-"
"""Start of TORCHELASTIC_RUN_ID in ranks that the run itself has started."""


class UnknownName(UserError):
    """A name that is not registered; the message lists what is."""


def check_choice(name: str, value: str, allowed: Iterable[str], about: str = "") -> None:
    """Refuse a setting that is not one of its values."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}{about}")


def check_range(name: str, value: float, low: float, high: float, about: str = "") -> None:
    """Refuse a setting outside of its bounds."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must be between {low} and {high}{about}")


class Registry:
    """Functions by name. Names come from the function; entry points of `group` are loaded on first use.

    A duplicate name raises an error: two meanings of one name would make results incomparable.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind, self.group = kind, group
        self._functions: dict[str, Callable] = {}
        self._loaded = group is None

    def register(self, function: T) -> T:
        """Decorator: add `function` under its own name."""
        self._add(function.__name__, function)
        return function

    def _add(self, name: str, function: Callable, source: str = "") -> None:
        if self._functions.setdefault(name, function) is not function:
            other = self._functions[name].__module__
            raise ValueError(f"{self.kind} {name!r}{source} is already registered by {other}; choose another name")

    def _load(self) -> None:
        points = [] if self._loaded else entry_points(group=self.group or "")
        self._loaded = True
        for point in points:
            try:
                function = point.load()
            except (ImportError, AttributeError) as error:  # somebody else's package; the rest still works
                warnings.warn(f"{self.kind} {point.name!r} cannot be loaded: {error}", stacklevel=3)
                continue
            if callable(function):  # else it is a module, which registers by decorator
                self._add(point.name, function, f" of the entry point {point.value}")

    def __getitem__(self, name: str) -> Callable:
        self._load()
        if name not in self._functions:
            raise UnknownName(unknown(self.kind, name, self._functions))
        return self._functions[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._functions

    def names(self) -> list[str]:
        """All names, those of entry points included."""
        self._load()
        return sorted(self._functions)
