"""Flips and points as the real client wrote them offline; the saved view asks for nothing that is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers.running import by_label, one_line, outcomes, run
from test_wandb import log_records

from ivtp.cli.wandb_view import main
from ivtp.report.wandb_view import workspace

ROWS = "variants=[{label:unpruned,pruner:none},{label:random,section:floor,pruner:random}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("wandb")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    with patch.dict(os.environ, {**clean, "WANDB_MODE": "offline"}, clear=True):
        settings = ("name=logged", "logger=wandb", "logger.samples=3", "debug=limit")
        assert run(ROWS, *settings, output=output, quick=False) == 0
    return output / "logged"


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, dict]:
    """Per run, by its name: the run's own record, its config, what it logged, and its folder of files."""
    found = {}
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        records = list(log_records(path))
        own = next(r.run for r in records if r.HasField("run"))
        logged = {}
        for kind in ("history", "summary"):
            for record in (r for r in records if r.WhichOneof("record_type") == kind):
                items = record.history.item if kind == "history" else record.summary.update
                for item in items:
                    put(logged, [item.key] if item.key else list(item.nested_key), json.loads(item.value_json))
        config = {item.key: json.loads(item.value_json) for item in own.config.update}
        # A table with pictures is an artifact; a file of its manifest lies where it waits for being synced.
        manifests = {r.artifact.name.rsplit("-", 1)[1]: r.artifact.manifest for r in records if r.HasField("artifact")}
        files = {name: {c.path: Path(c.local_path) for c in m.contents} for name, m in manifests.items()}
        found[own.display_name] = {"config": config, "logged": logged, "files": files}
    return found


def put(values: dict, names: list[str], value) -> None:
    """Set a value under nested keys, as the client takes dictionaries apart."""
    *above, last = names
    for name in above:
        values = values.setdefault(name, {})
    values[last] = value


def table(one: dict, name: str) -> list[dict]:
    assert one["logged"][name]["_type"] == "table-file"
    content = json.loads(one["files"][name][f"{name}.table.json"].read_text())
    return [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]


def test_the_config_is_all_that_a_row_depends_on_and_its_points_are_there(folder, runs):
    rows = by_label(folder)
    assert set(runs) == set(rows)
    for label, one in runs.items():
        record = rows[label]
        for name in ("label", "section", "cuts", "code", "git", "machine", "versions"):
            assert one["config"][name] == record[name], name
        points = {line["part"]: (line["tflops"], line["accuracy"]) for line in table(one, "cost")}
        accuracy = record["metrics"]["accuracy"]["mean"]
        assert points == {part: (value, accuracy) for part, value in record["tflops"].items()}


def test_samples_and_flips_are_those_of_the_outcomes(folder, runs):
    rows = by_label(folder)
    before = {o["id"]: o["prediction"] for o in outcomes(folder, rows["unpruned"])}
    for label, one in runs.items():
        found = {o["id"]: o for o in outcomes(folder, rows[label])}
        samples = table(one, "samples")
        assert {line["id"] for line in samples} == set(found)
        for line in samples:
            assert line["prediction"] == found[line["id"]]["prediction"]
            assert line["flipped"] == (line["prediction"] != before[line["id"]])
        flips = table(one, "flips")
        assert {line["id"] for line in flips} == {line["id"] for line in samples if line["flipped"]}
        counts = {kind: one["logged"][f"unpruned/flips/{kind}"] for kind in ("gained", "lost", "changed")}
        assert counts == {kind: sum(line["flip"] == kind for line in flips) for kind in counts}
    pictures = [line["kept"] for line in table(runs["random"], "samples") if line["kept"]]
    assert len(pictures) == 3
    for picture in pictures:
        assert runs["random"]["files"]["samples"][picture["path"]].stat().st_size > 1000
    assert not any(line["kept"] for line in table(runs["unpruned"], "samples"))


def panels(view) -> list[dict]:
    sections = view._spec["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def test_the_saved_view_shows_what_the_runs_log(runs):
    view = workspace("team", "ivtp")
    logged = set(runs["random"]["logged"])
    asked = set()
    for panel in panels(view):
        config = panel["config"]
        asked |= set(config.get("metrics", [])) | set(config.get("mediaKeys", []))
        asked |= {config[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis") if config.get(axis)}
        if panel["viewType"] == "Weave":
            asked.add(config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"])
    pinned = view._spec["spec"]["section"]["runSets"][0]["runFeed"]["columnPinned"]
    asked |= {name.removeprefix("summary:") for name in pinned if name != "run:displayName"}
    assert asked - logged == set()
    assert {"accuracy", "tflops/total", "accuracy/exist", "samples", "flips", "kept_tokens"} <= asked


def test_the_view_groups_runs_by_experiment_and_can_show_one_alone():
    view = workspace("team", "ivtp", "table1")._spec
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "ivtp", "ivtp: table1")
    run_set = view["spec"]["section"]["runSets"][0]
    assert [key["name"] for key in run_set["grouping"]] == ["group", "displayName"]
    (only,) = run_set["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("group", "=", "table1")
    kinds = [panel["viewType"] for panel in panels(workspace("team", "ivtp", "table1"))]
    assert {"Scatter Plot", "Bar Chart", "Weave", "Media Browser"} <= set(kinds)


def test_saving_sends_the_view_and_prints_its_address(capsys):
    sent = []

    def upsert(view):
        sent.append(view)
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    with (
        patch("ivtp.report.wandb_view.logged_in", return_value=True),
        patch("wandb_workspaces.workspaces.internal.upsert_view2", upsert),
        patch("wandb.Api"),
        patch("wandb_workspaces.workspaces.interface.get_app_url", return_value="https://wandb.example"),
    ):
        assert main(["team/ivtp", "--experiment", "table1"]) == 0
    assert sent[0].display_name == "ivtp: table1"
    assert "team/ivtp" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["team"], ["a/b/c"], [], ["team/ivtp", "--experiment"], ["/ivtp"]])
def test_anything_else_is_refused_in_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert one_line(capsys.readouterr().err)


def test_without_a_login_nothing_is_sent(capsys):
    with (
        patch("ivtp.report.wandb_view.logged_in", return_value=False),
        patch("wandb_workspaces.workspaces.Workspace.save") as save,
    ):
        assert main(["team/ivtp"]) == 2
    assert not save.called
    assert "wandb login" in one_line(capsys.readouterr().err)
