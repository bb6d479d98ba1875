"""How far a row is: a bar with rate and time left, and where nobody looks at a terminal a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ivtp.text import one_line

EVERY = 30.0
"""Seconds between two lines."""


class Rate(ProgressColumn):
    """Samples per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


@contextmanager
def progress(
    console, title: str, total: int, done: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Within the context, what is yielded is told how many of `total` samples are done; `done` were before."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(one_line(title), total=total, completed=done)
            yield lambda now: bar.update(task, completed=now)
        return
    start = said = clock()

    def say(now: int) -> None:
        nonlocal said
        moment = clock()
        if moment - said < EVERY or now in (done, total):
            return
        said = moment
        rate = (now - done) / (moment - start)
        console.print(f"{title}: {now}/{total}, {rate:.3g}/s, {spelled((total - now) / rate)} left", soft_wrap=True)

    yield say


def spelled(seconds: float) -> str:
    """ "1:02:03" or "2:03" of seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
