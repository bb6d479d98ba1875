"""Weights & Biases, offline: what was logged is read back from the .wandb files, record by record."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
from helpers.running import environment, lines, run, spawn
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
    for path in (place / "out" / "run" / "wandb").glob("offline-run-*/*.wandb"):
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
