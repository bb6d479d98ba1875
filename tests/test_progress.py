"""What is said while a row runs."""

from __future__ import annotations

import io

from rich.console import Console

from ivtp.progress import progress, spelled


def test_without_a_terminal_there_is_a_line_now_and_then_with_rate_and_time_left():
    """A log of a night's run says where it is, and does not fill up with lines."""
    out, now = io.StringIO(), [0.0]
    with progress(Console(file=out), "2/9 ivtp", 1000, 100, clock=lambda: now[0]) as tell:
        for done in range(150, 1001, 50):
            now[0] += 10
            tell(done)
    lines = out.getvalue().splitlines()
    assert lines[0] == "2/9 ivtp: 250/1000, 5/s, 2:30 left"
    assert lines[1] == "2/9 ivtp: 400/1000, 5/s, 2:00 left"
    assert len(lines) == 5  # none at the end: the row's result follows


def test_a_short_row_says_nothing_of_its_way():
    out, now = io.StringIO(), [0.0]
    with progress(Console(file=out), "row", 20, 0, clock=lambda: now[0]) as tell:
        for done in (10, 20):
            now[0] += 5
            tell(done)
    assert out.getvalue() == ""


def test_a_terminal_shows_a_bar_with_rate_and_time_left():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with progress(console, "2/9 ivtp", 10, 0) as tell:
        for done in range(1, 11):
            tell(done)
    assert "2/9 ivtp" in out.getvalue() and "10/10" in out.getvalue() and "/s" in out.getvalue()


def test_times_are_spelled_out():
    assert [spelled(s) for s in (0.4, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
