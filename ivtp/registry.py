"""Name → object, with a decorator to add and a helpful error when a name is missing."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TypeVar

T = TypeVar("T", bound=Callable)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line that says what is not known, what was probably meant, and what there is.

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


class Terminated(KeyboardInterrupt):
    """A stop by SIGTERM, as schedulers send it, in place of Ctrl-C."""


class UnknownName(UserError):
    """A name that is not registered; the message lists what is."""


class Registry:
    """Functions by name. Names come from the function; entry points of `group` are found on first use.

    A duplicate raises: two meanings of one name would make results incomparable.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind, self.group = kind, group
        self._found: dict[str, Callable] = {}
        self._loaded = group is None

    def register(self, function: T) -> T:
        """Decorator: add `function` under its own name."""
        name = function.__name__
        if self._found.get(name, function) is not function:
            other = self._found[name].__module__
            raise ValueError(f"{self.kind} {name!r} is already registered by {other}; choose another name")
        self._found[name] = function
        return function

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for point in entry_points(group=self.group):
                try:
                    found = point.load()
                except (ImportError, AttributeError) as error:  # somebody else's package; the rest still works
                    warnings.warn(f"{self.kind} {point.name!r} cannot be loaded: {error}", stacklevel=3)
                    continue
                if not callable(found):  # a module, which registers by decorator
                    continue
                if self._found.get(point.name, found) is not found:
                    raise ValueError(
                        f"{self.kind} {point.name!r} of the entry point {point.value} is already registered by "
                        f"{self._found[point.name].__module__}; choose another name"
                    )
                self._found[point.name] = found

    def __getitem__(self, name: str) -> Callable:
        self._load()
        if name not in self._found:
            raise UnknownName(unknown(self.kind, name, self._found))
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._found

    def names(self) -> list[str]:
        self._load()
        return sorted(self._found)
