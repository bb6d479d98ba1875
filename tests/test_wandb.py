"""Weights & Biases, offline: what was logged is read back from the .wandb files, record by record."""

from __future__ import annotations

import csv
import json
import os
import struct
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
from helpers.running import environment, lines, one_line, run, spawn
from PIL import Image

ROWS = "variants=[{label: unpruned, pruner: none}, {label: ours, section: a section}]"
QUICK = ("debug=limit", "data.limit=5", "logger.samples=2")
BLOCK = 32768


def log_records(path: Path):
    """The protobuf records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    assert struct.unpack("<4sHB", content[:7]) == (b":W&B", 0xBEE1, 0)
    place, pieces = 7, []
    while place < len(content):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", content[place : place + 7])
        data = content[place + 7 : place + 7 + length]
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum
        place += 7 + length
        pieces.append(data)
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(b"".join(pieces))
            pieces = []
            yield record


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run with the logger on, where nobody is logged in and HOME is watched."""
    place = tmp_path_factory.mktemp("wandb")
    (place / "home").mkdir()
    (place / "cwd").mkdir()
    env = environment(HOME=str(place / "home"), XDG_CACHE_HOME=str(place / "home"), XDG_CONFIG_HOME=str(place / "home"))
    done = spawn(ROWS, *QUICK, f"output={place / 'out'}", env=env, cwd=place / "cwd")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return place


def put(into: dict, items) -> None:
    """Items by key, or by the keys on the way to them."""
    for item in items:
        place, *deeper = item.nested_key or [item.key]
        target = into
        for key in deeper:
            target = target.setdefault(place, {})
            place = key
        target[place] = json.loads(item.value_json)


def runs(place: Path) -> dict[str, dict]:
    """Name → what a run logged: the run record, config, summary, history."""
    found = {}
    for path in place.glob("**/offline-run-*/*.wandb"):
        one = defaultdict(dict)
        one["folder"] = path.parent
        for record in log_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                one["run"] = record.run
                one["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "summary":
                put(one["summary"], record.summary.update)
            elif kind == "history":
                put(one["history"], record.history.item)
            elif kind == "artifact":
                contents = record.artifact.manifest.contents
                one["artifacts"] |= {entry.path: Path(entry.local_path) for entry in contents}
            elif kind == "exit":
                one["exit"] = record.exit
        found[one["run"].display_name] = one
    return found


def test_one_run_per_row_grouped_by_experiment_and_tagged(logged):
    found = runs(logged)
    assert set(found) == {"unpruned", "ours"}
    for one in found.values():
        assert one["run"].run_group == "run"
        assert one["run"].project == "ivtp"
        assert one["exit"].exit_code == 0
    assert set(found["ours"]["run"].tags) == {"ivtp", "a section"}
    assert len({one["run"].run_id for one in found.values()}) == 2


def test_the_config_is_that_of_the_record(logged):
    for record in lines(logged / "out" / "run" / "results.jsonl"):
        config = runs(logged)[record["label"]]["config"]
        for key in ("pruner", "budget", "model", "data", "seed"):
            assert config[key] == record[key], key


def test_metrics_and_cost_are_those_of_the_record(logged):
    for record in lines(logged / "out" / "run" / "results.jsonl"):
        one = runs(logged)[record["label"]]
        seen = {**one["history"], **one["summary"]}
        assert seen["accuracy"] == pytest.approx(record["metrics"]["accuracy"]["mean"])
        assert seen["tokens"] == record["tokens"][-1]
        for part, value in record["tflops"].items():
            assert seen[f"tflops/{part}"] == pytest.approx(value)
        assert seen["unpruned/agreement"] == pytest.approx(1) or record["label"] != "unpruned"


def test_the_table_of_samples_and_the_overlays_lie_below_the_output_folder(logged):
    one = runs(logged)["ours"]
    media = one["folder"] / "files"
    seen = {**one["history"], **one["summary"]}
    table = seen["samples"]
    assert table["_type"] == "table-file"
    content = json.loads((media / table["path"]).read_text())
    (record,) = [r for r in lines(logged / "out" / "run" / "results.jsonl") if r["label"] == "ours"]
    outcomes = lines(logged / "out" / "run" / "outcomes" / f"{record['key']}.jsonl")
    column = {name: i for i, name in enumerate(content["columns"])}
    assert len(content["data"]) == len(outcomes) == 5
    for row, outcome in zip(content["data"], outcomes, strict=True):
        for name in ("id", "question", "answer", "prediction", "correct"):
            assert row[column[name]] == outcome[name]
    # The table in the run's files names its pictures only; they travel with its artifact.
    kept = [row[-1] for row in json.loads(one["artifacts"]["samples.table.json"].read_text())["data"]]
    pictures = [one["artifacts"][picture["path"]] for picture in kept if picture]
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.is_relative_to(logged / "out" / "run")
        with Image.open(picture) as image:
            assert image.size[0] >= 144
            assert len(set(image.convert("L").tobytes())) > 20
    assert seen["kept_tokens"]["count"] == 2
    assert all((media / name).is_file() for name in seen["kept_tokens"]["filenames"])


def test_nothing_is_written_elsewhere(logged):
    home = logged / "home"
    left = [p.relative_to(home) for p in home.rglob("*") if p.is_file()]
    assert [p for p in left if "wandb" in str(p).lower()] == []
    assert list((logged / "cwd").iterdir()) == []


def test_a_row_that_was_logged_is_not_logged_again(logged):
    def files():
        return {p: p.stat().st_mtime_ns for p in (logged / "out" / "run" / "wandb").glob("offline-run-*/*.wandb")}

    before = files()
    done = spawn(ROWS, *QUICK, f"output={logged / 'out'}")
    assert done.returncode == 0, done.stderr
    assert files() == before


def test_logger_none_writes_nothing_of_wandb(tmp_path):
    assert run(ROWS, "data.limit=2", output=tmp_path) == 0
    assert [p for p in tmp_path.rglob("*") if "wandb" in p.name] == []


def test_the_mode_is_what_the_environment_says_else_offline_without_a_login(monkeypatch, tmp_path):
    from ivtp.report.wandb import mode

    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert mode() == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'0' * 40}\n")
    assert mode() == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode() == "online"
    assert "WANDB_MODE" not in os.environ


def test_settings_of_the_environment_are_honoured(tmp_path):
    """Also in a process of `wandb agent`, which waits for one run: the last row is that run, and no other is logged."""
    names = {"PROJECT": "mine", "ENTITY": "us", "RUN_GROUP": "gruppe", "TAGS": "one, two", "NAME": "night", "DIR": "w"}
    env = environment(**{f"WANDB_{name}": value for name, value in names.items()}, WANDB_MODE="offline")
    env["WANDB_DIR"] = str(tmp_path / "elsewhere")
    done = spawn(ROWS, *QUICK, f"output={tmp_path / 'out'}", env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not (tmp_path / "out" / "run" / "wandb").exists()
    found = runs(tmp_path / "elsewhere")
    assert set(found) == {"night: unpruned", "night: ours"}
    one = found["night: ours"]["run"]
    assert (one.project, one.entity, one.run_group) == ("mine", "us", "gruppe")
    assert set(one.tags) == {"ivtp", "a section", "one", "two"}

    agent = environment(WANDB_MODE="offline", WANDB_SWEEP_ID="abc", WANDB_RUN_ID="xyz", WANDB_PROJECT="mine")
    done = spawn(ROWS, *QUICK, f"output={tmp_path / 'agent'}", "--pruner.tau=0.3", env=agent)
    assert done.returncode == 0, done.stderr
    (one,) = runs(tmp_path / "agent" / "run" / "wandb").values()
    assert (one["run"].run_id, one["run"].sweep_id, one["config"]["label"]) == ("xyz", "abc", "ours")
    assert one["config"]["pruner"]["tau"] == 0.3


@pytest.mark.parametrize(
    ("variables", "arguments", "said"),
    [
        ({"MODE": "online"}, [], "no key of Weights & Biases is known; run `wandb login`"),
        ({"MODE": "online", "API_KEY": "abc"}, [], "the key of Weights & Biases is malformed"),
        ({"API_KEY": "abc"}, [], "the key of Weights & Biases is malformed"),
        ({"MODE": "sometimes"}, [], "WANDB_MODE='sometimes' is not one of online, offline, disabled"),
        ({"MODE": "offline"}, ["logger.project=a/b"], "logger.project=a/b: Invalid project name"),
        ({"MODE": "offline", "PROJECT": "p" * 129}, [], "exceeded 128 characters"),
        ({"MODE": "offline", "DIR": "/proc/none"}, [], "WANDB_DIR=/proc/none cannot be written"),
    ],
)
def test_what_the_first_row_would_fail_on_is_said_before_it(variables, arguments, said, tmp_path, monkeypatch, capfd):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert run(ROWS, *QUICK, *arguments, output=tmp_path / "out", quick=False) == 2
    assert said in one_line(capfd.readouterr().err)
    assert not (tmp_path / "out" / "run" / "results.jsonl").exists()


def test_nothing_is_marked_as_logged_where_the_client_is_disabled(tmp_path, monkeypatch):
    """The next run, with the client at work, logs all rows."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run(ROWS, *QUICK, output=tmp_path, quick=False) == 0
    assert not [path for path in tmp_path.rglob("*") if "wandb" in path.name]
    assert run(ROWS, *QUICK, "logger=[csv,tensorboard]", output=tmp_path, quick=False) == 0
    for record in lines(tmp_path / "run" / "results.jsonl"):
        (table,) = (tmp_path / "run" / "csv").glob(f"{record['label']}-{record['key'][:8]}/metrics.csv")
        with table.open() as file:
            (numbers,) = csv.DictReader(file)
        assert float(numbers["accuracy"]) == pytest.approx(record["metrics"]["accuracy"]["mean"])
        assert float(numbers["tokens"]) == record["tokens"][-1]
        assert list((tmp_path / "run" / "tensorboard").glob(f"{record['label']}-{record['key'][:8]}/events.*"))
