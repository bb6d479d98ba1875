"""Replace functions of a module within a context: in several threads, in any order, and never in a copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import nn

from ivtp.registry import UserError


class Entry:
    """The functions of one context, by name, and the thread that opened it."""

    def __init__(self, functions: Mapping[str, Callable]) -> None:
        self.functions, self.thread, self.open = functions, threading.get_ident(), True


_own: ContextVar[tuple[Entry, ...]] = ContextVar("ivtp_own", default=())
"""Contexts that this thread (or asyncio task) opened, in order; those that were closed elsewhere may linger."""
_lock = threading.Lock()
_replaced: dict[nn.Module, Replaced] = {}


class Replaced:
    """The state of one module while contexts are open on it.

    Only the module's own `__dict__` changes: each replaced name, and the methods that keep copies plain.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        self.module, self.entries = module, []
        # Layers are given masks and sizes for the length of one call, so that a model serves one call at a time.
        self.call_lock = threading.RLock()
        self.plain = {name: getattr(module, name) for name in names}
        self.replacements = {name: self._dispatch(name) for name in names}
        self.replacements |= {"__reduce_ex__": self._reduce, "_replicate_for_data_parallel": self._refuse}
        self.before = {name: vars(module)[name] for name in self.replacements if name in vars(module)}
        vars(module).update(self.replacements)

    def _dispatch(self, name: str) -> Callable:
        plain = self.plain[name]

        @torch.compiler.disable  # a graph of the whole model would hold one context's plan; see `PrunedModel.compile`
        @wraps(plain)
        def call(*args, **kwargs):
            entry = self.in_force()
            if entry is None:  # of a shallow copy that outlived the contexts
                return plain(*args, **kwargs)
            with self.call_lock:
                return entry.functions[name](*args, **kwargs)

        return call

    def in_force(self) -> Entry | None:
        """The innermost context that this thread opened, or else the innermost of the thread that opened the first."""
        entries, mine = list(self.entries), _own.get()
        own = [entry for entry in entries if entry in mine]
        return (own or [entry for entry in entries if entry.thread == entries[0].thread] or [None])[-1]

    def restore(self) -> None:
        """Give the module its own functions back."""
        for name in self.replacements:
            vars(self.module).pop(name, None)
        vars(self.module).update(self.before)

    def _reduce(self, protocol: int) -> tuple:
        """Reduce the module for `copy.deepcopy` and pickle, without the functions of a context."""
        reduced: Any = type(self.module).__reduce_ex__(self.module, protocol)
        function, arguments, state, *rest = reduced
        state = {name: value for name, value in state.items() if name not in self.replacements} | self.before
        return function, arguments, state, *rest

    def _refuse(self) -> None:
        raise UserError(
            "nn.DataParallel would run copies of this model on other GPUs, and ivtp.prune follows the model itself; run one "
            "process for each GPU (torchrun), or call the model without DataParallel"
        )


@contextmanager
def replaced(module: nn.Module, **functions: Callable) -> Iterator[None]:
    """Context in which `module` has `functions` in place of its own of the same names.

    A thread runs those of the innermost context that it opened itself; one that opened none, those of the thread that
    opened the first. Contexts may be closed in any order and by any thread: after the last, the module is what it was.
    """
    entry = Entry(functions)
    with _lock:
        if module not in _replaced:
            _replaced[module] = Replaced(module, tuple(functions))
        _replaced[module].entries.append(entry)
    _own.set((*(other for other in _own.get() if other.open), entry))
    try:
        yield
    finally:
        entry.open = False
        _own.set(tuple(other for other in _own.get() if other.open))
        with _lock:
            state = _replaced[module]
            state.entries.remove(entry)
            if not state.entries:
                state.restore()
                del _replaced[module]


def own(module: nn.Module, name: str) -> Callable:
    """The module's own function of that name, whatever contexts are open."""
    state = _replaced.get(module)
    return getattr(module, name) if state is None else state.plain[name]


@contextmanager
def set_to(value: object, module: nn.Module, name: str) -> Iterator[None]:
    """Context in which an attribute of `module` has another value."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class Latest:
    """Attribute with a value per thread: the last one that the thread set or, if it set none, the last one of any thread."""

    def __init__(self, first: object = None) -> None:
        self.first = first

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        if instance is None:
            return self
        own, last = vars(instance).get(self.name, (None, self.first))
        return getattr(own, "value", last)

    def __set__(self, instance: object, value: object) -> None:
        own, _ = vars(instance).setdefault(self.name, (threading.local(), None))
        own.value = value
        vars(instance)[self.name] = own, value
