"""Signals that stop a run: after the batch in flight, anywhere else at once. A second signal always stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """Stop by a signal. No Exception, which a sample could be blamed for; no KeyboardInterrupt, after which Lightning exits."""

    def __init__(self, number: int) -> None:
        super().__init__(number)  # as pickle has it: a launcher's worker may hand it to its parent
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


_received: int | None = None
_deferred = False


@contextmanager
def handled() -> Iterator[None]:
    """Turn the signals into Stopped within a block; those that the process ignores (nohup) stay ignored."""
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield  # the only thread that may set handlers is another one
        return
    _received = None
    before = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, _handle)
        yield
    finally:
        resume()
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, _: object) -> None:
    global _received
    wait = _deferred and _received is None
    _received = number
    if not wait:
        raise Stopped(number)


def defer() -> None:
    """Keep the first signal in mind from here to `check` or `resume`: a batch is in flight."""
    global _deferred
    _deferred = True


def resume() -> None:
    """Stop at once from here on."""
    global _deferred
    _deferred = False


def check() -> None:
    """End of a batch: raise Stopped if a signal has arrived, also one whose exception a library has lost."""
    resume()
    if _received is not None:
        raise Stopped(_received)
