"""One writer per folder, and strict reading: what is doubled, torn, missing or foreign is found, said and evaluated again."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
from helpers.running import lines, one_line, run

from ivtp import results as store
from ivtp.cli.report import main as report
from ivtp.data.outcomes import FIELDS
from ivtp.experiment.outcome_files import OutcomeFiles

EMOJI = ("model=tiny_clip", "data=emoji", "data.size=4", "data.background=photo", "pruner=layerwise", "viewer=1")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The folder of a run in which nothing is wrong."""
    output = tmp_path_factory.mktemp("healthy")
    assert run(*EMOJI, output=output) == 0
    return output / "run"


@pytest.fixture
def folder(healthy, tmp_path):
    return shutil.copytree(healthy, tmp_path / "run")


def files(folder) -> dict[str, bytes]:
    """Everything that must be as if nothing had happened."""
    paths = [*folder.glob("outcomes/*.jsonl"), *(folder / name for name in ("table.md", "comparisons.json"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextmanager
def another_writer(folder, name=store.LOCK):
    """Another process that holds a lock; its number. lmms-eval lets all locks of one process share what they hold."""
    code = "from pathlib import Path; from ivtp.results import only_writer\n"
    code += f"with only_writer(Path({str(folder)!r}), {name!r}): print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    yield process.pid
    process.communicate(b"\n")


# One writer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [lambda folder: run(*EMOJI, output=folder.parent), lambda folder: report([str(folder)])]
)
def test_a_second_writer_is_refused_in_one_line_that_names_the_first(folder, monkeypatch, capsys, command):
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    before = files(folder)
    with another_writer(folder) as writer:
        assert command(folder) == 2
        line = one_line(capsys.readouterr().err)
    assert f"run is being written by process {writer} on {socket.gethostname()} since 20" in line
    assert files(folder) == before
    assert command(folder) == 0, "the lock was not released"
    assert not (folder / ".lock.json").exists()


def test_the_lock_of_a_dead_process_does_not_count(folder):
    (folder / ".lock").touch()
    (folder / ".lock.json").write_text('{"pid": 1, "host": "gone", "time": "yesterday"}')
    assert run(*EMOJI, output=folder.parent) == 0


def test_a_rank_that_outlives_its_run_is_waited_for(folder, monkeypatch, capsys):
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    with another_writer(folder, ".lock.rank1") as writer:
        assert run(*EMOJI, output=folder.parent) == 2
    assert f"is being written by process {writer}" in one_line(capsys.readouterr().err)


# Strict reading -----------------------------------------------------------------------------------------------------


def double(path):
    path.write_bytes(path.read_bytes() * 2)


def lose(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[3:]))


def tear(path):
    path.write_bytes(path.read_bytes()[:-7])


def foreign(path):
    other = json.loads(path.read_bytes().splitlines()[0]) | {"id": "of another data set"}
    path.write_bytes(path.read_bytes() + store.lines([*store.with_schema([{"a": 1}]), other]))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (double, "40 line(s) set aside (40 doubled)"),
        (lose, "17 outcomes on disk are not those of its result"),
        (tear, "1 line(s) set aside (1 torn)"),
        (foreign, "2 line(s) set aside (2 of no sample)"),
        (lambda path: path.unlink(), "0 outcomes on disk are not those of its result"),
    ],
    ids=["doubled", "missing", "torn", "foreign", "no file"],
)
def test_outcomes_that_cannot_be_used_are_evaluated_again(healthy, folder, capsys, harm, said):
    """Two runs at once left every outcome twice: n and p-values were those of twice as many samples."""
    records = lines(folder / "results.jsonl")
    path = folder / "outcomes" / f"{records[1]['key']}.jsonl"
    before = path.read_bytes()
    harm(path)
    harmed = path.read_bytes() if path.is_file() else b""
    if said != "2 line(s) set aside (2 of no sample)":
        assert report([str(folder)]) == 2
        assert "run the same experiment again" in one_line(capsys.readouterr().err)
        for aside in folder.glob(f"outcomes/{path.name}.*"):
            aside.unlink()
    if harmed:
        path.write_bytes(harmed)
    assert run(*EMOJI, output=folder.parent) == 0
    assert said in capsys.readouterr().out.replace("\n", " ")
    assert path.read_bytes() == before and files(folder) == files(healthy)
    assert lines(folder / "results.jsonl") == records, "the result is as it was"
    aside = [found.read_bytes() for found in folder.glob(f"outcomes/{path.name}.*")]
    lost = set(harmed.splitlines()) - set(before.splitlines()) if harm is not double else set(before.splitlines())
    assert {line for content in aside for line in content.splitlines()} == lost


def test_results_of_two_runs_at_once_are_told_apart(healthy, folder, capsys):
    """Every row and outcome twice, and a metric of twice the samples: the folder is as if that had never happened."""
    records = lines(folder / "results.jsonl")
    wrong = [
        record | {"metrics": record["metrics"] | {"images": 2 * record["metrics"]["images"]}} for record in records
    ]
    (folder / "results.jsonl").write_bytes(b'{"label": 5}\n' + store.lines([*records, *records, *wrong, *wrong]))
    for path in folder.glob("outcomes/*.jsonl"):
        double(path)
    assert run(*EMOJI, output=folder.parent) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert (
        "4 doubled line(s) of" in out
        and "1 torn line(s) of" in out
        and out.count("line(s) set aside (40 doubled)") == 2
    )
    assert files(folder) == files(healthy)
    kept = lines(folder / "results.jsonl")
    assert [record["metrics"] for record in kept[-2:]] == [record["metrics"] for record in records]
    assert len(lines(folder / "results.jsonl.aside")) == 5
    assert run(*EMOJI, output=folder.parent) == 0
    assert lines(folder / "results.jsonl") == kept and "set aside" not in capsys.readouterr().out


# Files of several ranks ---------------------------------------------------------------------------------------------


def outcome(name: str, **more) -> dict:
    return {**dict.fromkeys(FIELDS, ""), "id": name, "image": name, **more}


def test_files_of_any_number_of_ranks_become_one_in_the_order_of_the_data(tmp_path):
    names = [f"s{number}" for number in range(23)]
    for seed in range(5):
        draw, said = random.Random(seed), []
        kept = OutcomeFiles(tmp_path, names, said.append)
        shuffled = draw.sample(names, len(names))
        for start in range(0, len(names), 4):
            kept.append("key", draw.randrange(5), [outcome(name) for name in shuffled[start : start + 4]])
        assert [o["id"] for o in kept.gather("key")] == names and not said
        kept.write("key", kept.gather("key"))
        assert [path.name for path in (tmp_path / "outcomes").iterdir()] == ["key.jsonl"]
        assert [o["id"] for o in kept.gather("key")] == names
        (tmp_path / "outcomes" / "key.jsonl").unlink()


def test_a_new_outcome_takes_the_place_of_a_failure_and_of_nothing_else(tmp_path):
    said = []
    kept = OutcomeFiles(tmp_path, ["a", "b", "c", "d"], said.append)
    failed = [outcome("a", failed="no memory"), outcome("b", failed="no memory")]
    kept.write("key", [*failed, outcome("c"), outcome("d")])
    kept.append("key", 0, [outcome("a", correct=True)])
    kept.append("key", 1, [outcome("c"), outcome("d", correct=False)])  # c: killed between merging and removing
    assert kept.gather("key") == [outcome("a", correct=True), failed[1], outcome("c")]
    (line,) = said
    assert "2 line(s) set aside (2 doubled)" in line
