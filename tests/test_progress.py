"""What is said while a row runs."""

from __future__ import annotations

import io

from rich.console import Console

from ivtp.evaluation.progress import RowProgress, clock_time


def advance(progress: RowProgress, count: int) -> None:
    progress.on_test_batch_end(None, None, {"outcomes": [{}] * count}, None, 0)


def test_without_a_terminal_there_is_a_line_now_and_then_with_rate_and_time_left():
    """A log of a night's run says where it is, and does not fill up with lines."""
    out, now = io.StringIO(), [0.0]
    progress = RowProgress(Console(file=out), "2/9 ivtp", 1000, 100, clock=lambda: now[0])
    for _ in range(150, 1001, 50):
        now[0] += 10
        advance(progress, 50)
    lines = out.getvalue().splitlines()
    assert lines[0] == "2/9 ivtp: 250/1000, 5/s, 2:30 left"
    assert lines[1] == "2/9 ivtp: 400/1000, 5/s, 2:00 left"
    assert len(lines) == 5  # none at the end: the row's result follows


def test_a_short_row_says_nothing_of_its_way():
    out, now = io.StringIO(), [0.0]
    progress = RowProgress(Console(file=out), "row", 20, 0, clock=lambda: now[0])
    for _ in (10, 20):
        now[0] += 5
        advance(progress, 10)
    assert out.getvalue() == ""


def test_a_terminal_shows_a_bar_with_rate_and_time_left():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    progress = RowProgress(console, "2/9 ivtp", 10, 0)
    progress.on_test_start(None, None)
    for _ in range(1, 11):
        advance(progress, 1)
    progress.on_test_end(None, None)
    assert "2/9 ivtp" in out.getvalue() and "10/10" in out.getvalue() and "/s" in out.getvalue()


def test_times_are_spelled_out():
    assert [clock_time(s) for s in (0.4, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
