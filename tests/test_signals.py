"""A stop by a signal is never lost, and never tears a batch."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import threading

import pytest
from helpers.running import command, environment

from ivtp import signals
from ivtp.cli.command import command as run_command
from ivtp.signals import STOPPING, Stopped


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_it_stops_at_once_outside_of_a_batch_and_with_the_status_of_the_signal(number, capsys):
    before = signal.getsignal(number)
    assert run_command([], str, lambda _: send(number)) == 128 + number
    assert capsys.readouterr().err == "ivtp: stopped; the same command goes on from here\n"
    assert signal.getsignal(number) is before


def test_within_a_batch_the_first_one_waits_and_the_second_does_not():
    with signals.handled():
        signals.defer()
        send(signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            signals.check()
        signals.resume()
    with signals.handled():
        signals.defer()
        send(signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGINT"):
            send(signal.SIGINT)
    with signals.handled():
        signals.defer()
        signals.check()  # what an earlier run received is forgotten


def test_one_that_a_library_swallows_stops_the_run_after_the_batch():
    """Python discards what is raised while an object is destroyed."""

    class Noisy:
        def __del__(self):
            send(signal.SIGTERM)

    with signals.handled():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("sys.unraisablehook", lambda _: None)
            Noisy()
        signals.defer()
        with pytest.raises(Stopped):
            signals.check()


def test_a_worker_of_a_launcher_hands_a_stop_to_its_parent():
    """joblib pickles what a job raises."""
    stop = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM)))
    assert stop.number == signal.SIGTERM and str(stop) == "SIGTERM"


def test_an_error_of_a_sample_is_no_stop():
    assert not issubclass(Stopped, (Exception, KeyboardInterrupt))


def test_what_the_process_ignores_stays_ignored():
    """nohup, and a job in the background of a shell."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            send(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_installed():
    status = []
    thread = threading.Thread(target=lambda: status.append(run_command([], str, lambda _: None)))
    thread.start()
    thread.join()
    assert status == [0]


def test_a_signal_while_the_model_is_loaded_ends_the_command_in_one_line(tmp_path):
    process = subprocess.Popen(
        command("logger=none", f"output={tmp_path}"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout.readline().startswith("run: 2 rows")
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (129, "ivtp: stopped; the same command goes on from here\n")
