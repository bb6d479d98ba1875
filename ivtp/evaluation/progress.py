"""Progress of one row: a bar in a terminal, otherwise a line every 30 s."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ivtp.text import one_line

EVERY = 30.0
"""Seconds between two lines."""


class Rate(ProgressColumn):
    """Samples per second."""

    def render(self, task: Task) -> Text:
        """Rate of a task as text."""
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


class RowProgress(L.Callback):
    """Progress of one row in samples; Lightning's own bars count batches.

    done   samples with an outcome before the start
    share  of the samples that are left, the fraction that this rank evaluates: the others are as fast
    """

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        done: int,
        clock: Callable[[], float] = time.monotonic,
        share: float = 1.0,
    ) -> None:
        self.console, self.title, self.total, self.before, self.done = console, title, total, done, done
        self.clock, self.start, self.share, self.own = clock, clock(), share, 0
        self.printed = self.start
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), Rate()
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self.task = self.bar.add_task(one_line(title), total=total, completed=done)

    def on_test_start(self, trainer, pl_module) -> None:
        """Show the bar."""
        if self.console.is_terminal:
            self.bar.start()

    def on_test_batch_end(self, trainer, pl_module, outputs: Any, batch, batch_idx, dataloader_idx=0) -> None:
        """Count the outcomes of a batch."""
        self.own += len(outputs["outcomes"])
        self.done = self.before + round(self.own / self.share)
        self.bar.update(self.task, completed=self.done)
        now = self.clock()
        if self.console.is_terminal or now - self.printed < EVERY or self.done == self.total:
            return
        self.printed = now
        rate = (self.done - self.before) / (now - self.start)
        left = clock_time((self.total - self.done) / rate)
        self.console.print(f"{self.title}: {self.done}/{self.total}, {rate:.3g}/s, {left} left", soft_wrap=True)

    def on_test_end(self, trainer, pl_module) -> None:
        """Remove the bar."""
        if self.console.is_terminal:  # elsewhere rich would end it with an empty line
            self.bar.stop()

    def on_exception(self, trainer, pl_module, exception) -> None:
        """Remove the bar."""
        self.on_test_end(trainer, pl_module)


def clock_time(seconds: float) -> str:
    """Format seconds as "1:02:03" or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
