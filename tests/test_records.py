"""Records on disk: whole lines or none, JSON that every reader accepts, keys that change with what they stand for."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivtp import results as records
from ivtp.results import SCHEMA, RecordError, read_outcomes, read_results

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
ROWS = st.lists(st.dictionaries(st.text(), SCALARS | st.lists(SCALARS, max_size=3), max_size=4), max_size=6)


@given(first=ROWS, second=ROWS)
def test_what_was_appended_is_read_back(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("records") / "rows.jsonl"
    records.append(path, first)
    records.append(path, second)
    assert records.read(path) == (first + second, 0)


def test_folders_are_made_and_a_missing_file_holds_nothing(tmp_path):
    path = tmp_path / "a" / "b" / "rows.jsonl"
    assert records.read(path) == ([], 0)
    records.append(path, [{"a": 1}])
    assert records.read(path) == ([{"a": 1}], 0)


def test_what_is_not_known_is_null_never_nan(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.append(path, [{"se": math.nan, "all": (math.inf, 1.0, {"x": -math.inf})}])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"se": None, "all": [None, 1.0, {"x": None}]}


@pytest.mark.parametrize("cut", [1, 2, 5, 11])
def test_a_torn_line_is_set_aside_and_the_next_one_starts_a_line_of_its_own(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    records.append(path, [{"n": 1}, {"n": 2}])
    records.append(path, [{"number": 3}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert records.read(path) == ([{"n": 1}, {"n": 2}], 1)
    assert (tmp_path / "rows.jsonl.torn").read_bytes() == whole.splitlines(keepends=True)[-1][:-cut]
    records.append(path, [{"n": 4}])
    assert records.read(path) == ([{"n": 1}, {"n": 2}, {"n": 4}], 0)


def test_torn_lines_of_two_accidents_are_both_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    for torn in (b'{"a": 1', b'{"b": 2'):
        path.write_bytes(torn)
        assert records.read(path) == ([], 1)
    assert (tmp_path / "rows.jsonl.torn").read_bytes() == b'{"a": 1{"b": 2'


@pytest.mark.parametrize("line", [b"5\n", b"null\n", b"[1]\n", b"\xff\xfe\n", b"{'a': 1}\n"])
def test_a_line_that_is_no_record_is_set_aside_too(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'{"a": 2}\n')
    assert records.read(path) == ([{"a": 1}, {"a": 2}], 1)


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    records.append(path, [{"n": 1}])
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"rows\.jsonl: No space left on device; make room or choose another folder"):
        records.append(path, [{"n": 2}])
    assert path.read_bytes() == before


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    records.replace(path, b"old")
    seen = []

    def fails(source, target):
        seen.append((os.path.getsize(source), path.read_bytes()))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails)
        with pytest.raises(RecordError, match="No space left"):
            records.replace(path, b"newer")
    assert seen == [(5, b"old")]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"], "a temporary file was left behind"


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    (tmp_path / "outputs").write_text("a file")
    for write in (lambda p: records.append(p, [{}]), lambda p: records.replace(p, b"")):
        with pytest.raises(RecordError, match="output=FOLDER"):
            write(tmp_path / "outputs" / "run" / "results.jsonl")


def test_keys_depend_on_content_and_not_on_the_order_of_keys():
    assert records.key({"a": 1, "b": 2}, "x") == records.key({"b": 2, "a": 1}, "x")
    different = [
        records.key({"tau": 0.2}),
        records.key({"tau": 0.3}),
        records.key({"tau": "0.2"}),
        records.key({"t": 0.2}),
    ]
    assert len(set(different)) == 4


def test_a_fingerprint_sees_names_and_every_byte_of_large_files(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"1")
    first = records.fingerprint([path])
    path.write_bytes(b"2")
    assert records.fingerprint([path]) != first
    other = tmp_path / "b.bin"
    other.write_bytes(b"2")
    assert records.fingerprint([other]) != records.fingerprint([path])
    assert records.fingerprint([other, path]) == records.fingerprint([path, other])

    large = bytearray(40 << 20)
    path.write_bytes(large)
    before = records.fingerprint([path])
    for place in (0, 17 << 20, -1):  # a merge may change a few tensors in the middle
        changed = bytearray(large)
        changed[place] = 1
        path.write_bytes(changed)
        assert records.fingerprint([path]) != before


def test_the_code_version_changes_with_the_code(tmp_path, monkeypatch):
    copy = shutil.copytree(Path(records.__file__).parent, tmp_path / "ivtp", ignore=shutil.ignore_patterns("assets"))
    monkeypatch.setattr(records, "__file__", str(copy / "results.py"))
    first = records.code_version()
    assert records.code_version() == first
    (copy / "core" / "scores.py").write_text("# other code\n")
    assert records.code_version() != first


# Schema -------------------------------------------------------------------------------------------------------------

OLD = Path(__file__).parent / "schema"
"""A line of results.jsonl and one of outcomes/ as they were before there were versions; in version 2 outcomes state it."""


def test_lines_of_the_first_version_are_read_and_written_in_the_present_one(tmp_path):
    path = tmp_path / "results.jsonl"
    old = json.loads(Path(shutil.copy(OLD / "results_1.jsonl", path)).read_text())
    ((result,), torn) = read_results(path)
    assert torn == 0 and (result.label, result.tokens, result.cuts) == (old["label"], old["tokens"], old["cuts"])
    assert result.drawable and result.failed is None and result.reference is None
    new = {"early_accuracy": "acc_early", "hit_rate": "hit", "target_share": "share"}
    for name in result.metrics:
        assert result.metrics[name] == old["metrics"][new.get(name, name)]
    records.replace(path, b"")
    records.append_results(path, [result])
    assert read_results(path) == ([result], 0)
    line = json.loads(path.read_text())
    assert line["schema"] == SCHEMA
    assert {name: line[name] for name in old if name != "metrics"} == {n: v for n, v in old.items() if n != "metrics"}


@pytest.mark.parametrize("version", [1, 2])
def test_outcomes_of_an_older_version_are_read(tmp_path, version):
    path = tmp_path / "outcomes.jsonl"
    old = json.loads((OLD / "outcomes_1.jsonl").read_text())
    path.write_text(json.dumps(old if version == 1 else {"schema": version} | old) + "\n")
    (outcome,) = read_outcomes(path)
    assert (outcome.pop("target_hit"), outcome.pop("target_share")) == (old.pop("hit"), old.pop("share"))
    assert outcome == old
    path.write_bytes(records.lines(records.with_schema([outcome])))
    assert json.loads(path.read_text())["schema"] == SCHEMA and read_outcomes(path) == [outcome]


@pytest.mark.parametrize("read", [read_results, read_outcomes])
def test_a_file_of_a_newer_version_is_refused_in_one_line(tmp_path, read):
    path = tmp_path / "rows.jsonl"
    records.append(path, [{"schema": SCHEMA + 1, "label": "x"}])
    with pytest.raises(RecordError, match=r"rows\.jsonl has schema version 4, but this ivtp reads at most 3") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_what_is_not_stored_is_the_plan(tmp_path):
    from ivtp.core.plan import Plan
    from ivtp.experiment.planning import Planned

    line = Planned(label="x", plan=Plan(), planner=Plan(), cost=None).line()
    assert not {"plan", "planner", "cost", "failed"} & set(line) and line["paper"] is None


def test_the_results_that_are_committed_are_read():
    folder = Path(__file__).parent.parent / "experiments"
    paths = sorted(folder.glob("*/results.jsonl"))
    assert len(paths) > 10
    for path in paths:
        results, torn = read_results(path)
        assert torn == 0 and all("hit_rate" in result.metrics and result.label for result in results)
