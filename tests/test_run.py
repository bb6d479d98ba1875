"""The main job from end to end on the embedded model: what it writes, and that it goes on where it was."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from helpers.running import by_label, command, environment, finished, lines, outcomes, run
from PIL import Image

SAMPLES = 20  # of debug=limit


def test_the_group_size_ablation_has_a_row_for_every_size_at_equal_tokens_and_at_equal_flops():
    rows = by_label(finished())
    assert rows["unpruned"]["tokens"][-1] == 324
    target = rows["group all"]["tflops"]["total"]
    for group in ("all", 2, 3, 4, 6):
        assert rows[f"group {group}"]["tokens"][-1] == 36
        if group != "all":
            assert rows[f"group {group}, equal FLOPs"]["tflops"]["total"] == pytest.approx(target, rel=0.02)
    # The floor and the control keep what the method keeps; only who stays differs.
    for other in ("random, group 3", "group 3, random in the LLM"):
        assert rows[other]["cuts"] == rows["group 3"]["cuts"], other
    assert rows["group 2"]["tflops"]["total"] < rows["group 6"]["tflops"]["total"] < rows["unpruned"]["tflops"]["total"]


def test_every_record_says_what_was_run_on_what_and_with_which_error():
    for record in lines(finished() / "results.jsonl"):
        accuracy = record["metrics"]["accuracy"]
        assert accuracy["n"] == SAMPLES
        assert 0 <= accuracy["mean"] <= 1
        assert set(record["tflops"]) == {"vision", "projector", "language", "extra", "total"}
        for key in (
            "pruner",
            "budget",
            "cuts",
            "model",
            "data",
            "prompt",
            "seed",
            "versions",
            "machine",
            "time",
            "code",
        ):
            assert record[key] is not None, key
        assert record["versions"]["torch"]
        assert record["model"]["hash"]


def test_outcomes_are_those_of_the_metrics():
    folder = finished()
    for record in lines(folder / "results.jsonl"):
        found = outcomes(folder, record)
        assert len({outcome["id"] for outcome in found}) == SAMPLES
        correct = [outcome["prediction"] == outcome["answer"] for outcome in found]
        assert correct == [outcome["correct"] for outcome in found]
        assert record["metrics"]["accuracy"]["mean"] == pytest.approx(np.mean(correct))
        if record["label"] != "unpruned":
            assert all(len(outcome["kept"]) == record["tokens"][-1] for outcome in found)
            assert all(outcome["kept"] == sorted(set(outcome["kept"])) for outcome in found)


def test_the_table_has_every_row_and_the_pictures_are_not_blank():
    folder = finished()
    table = (folder / "table.md").read_text()
    for label in by_label(folder):
        assert f"| {label} |" in table
    scenes = by_label(folder)["unpruned"]["data"]["scenes"]
    line = f"Data: scenes2, test split, seed 0, {scenes} scenes"
    assert line in table and line in (folder / "report.html").read_text()
    for name in ("accuracy_flops.png", "kept_tokens.png"):
        with Image.open(folder / name) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert pixels.shape[0] > 300, name
        assert pixels.shape[1] > 300, name
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, name
        ink = (pixels.sum(-1) < 700).mean()
        assert 0.005 < ink < 0.98, f"{name}: {ink:.1%} of the pixels are drawn on"


def test_pictures_differ_where_what_was_kept_differs():
    from ivtp.report.plots import overlay

    image = np.full((144, 144, 3), 200, np.uint8)
    few, other, all_of_it = (overlay(image, kept, 324) for kept in ([0, 1], [322, 323], list(range(324))))
    assert few.shape == (198, 198, 3)
    assert (few != other).any()
    assert few[:11, :22].mean() == pytest.approx(200, abs=1)
    assert few[100:].mean() < 100
    assert all_of_it.mean() == pytest.approx(200, abs=1)


def test_a_second_run_evaluates_nothing(tmp_path, monkeypatch):
    folder = shutil.copytree(finished(), tmp_path / "ablation_groupsize")
    before = {path: path.stat().st_mtime_ns for path in [folder / "results.jsonl", *folder.glob("outcomes/*")]}

    def never(*_, **__):
        raise AssertionError("a finished row was evaluated again")

    monkeypatch.setattr("lightning.Trainer.test", never)
    assert run("experiment=ablation_groupsize", output=tmp_path) == 0
    assert before == {path: path.stat().st_mtime_ns for path in [folder / "results.jsonl", *folder.glob("outcomes/*")]}


def test_the_model_also_answers_without_images_once(tmp_path, capsys):
    """Blind accuracy is that of the same questions, stands beside the table, and is not measured again."""
    folder = shutil.copytree(finished(), tmp_path / "ablation_groupsize")
    (blind,) = lines(folder / "blind.jsonl")
    asked = lines(folder / "outcomes" / f"{blind['key']}.jsonl")
    whole = lines(folder / "outcomes" / f"{lines(folder / 'results.jsonl')[0]['key']}.jsonl")
    assert [o["id"] for o in asked] == [o["id"] for o in whole] and all(o["kept"] is None for o in asked)
    assert blind["metrics"]["accuracy"]["mean"] == np.mean([o["correct"] for o in asked])
    assert blind["metrics"]["accuracy"]["mean"] < np.mean([o["correct"] for o in whole])
    assert run("experiment=ablation_groupsize", output=tmp_path) == 0
    assert lines(folder / "blind.jsonl") == [blind]
    table = (folder / "table.md").read_text()
    assert "| without images |" in table and "| commonest answer |" in table
    assert run("experiment=ablation_groupsize", "blind=false", output=tmp_path) == 0
    assert "without images" not in (folder / "table.md").read_text()
    capsys.readouterr()
    assert run("model=tiny_clip", "data=emoji", "pruner=rollout", "blind=true", output=tmp_path) == 2
    assert "an encoder is asked none" in capsys.readouterr().err


def test_a_torn_last_line_is_set_aside_and_the_rest_is_used(tmp_path, capsys):
    folder = shutil.copytree(finished(), tmp_path / "ablation_groupsize")
    results = folder / "results.jsonl"
    whole = results.read_bytes()
    kept = whole[: whole[:-1].rindex(b"\n") + 1]
    torn = whole[len(kept) : len(kept) + 100]
    results.write_bytes(kept + torn)
    assert run("experiment=ablation_groupsize", output=tmp_path) == 0
    assert "1 torn line" in capsys.readouterr().out
    assert (folder / "results.jsonl.torn").read_bytes() == torn
    again = lines(results)
    assert results.read_bytes().startswith(kept)
    assert len(again) == len(whole.splitlines())
    assert again[-1]["metrics"] == by_label(finished())[again[-1]["label"]]["metrics"]


def test_a_torn_outcome_is_answered_again_and_only_that_one(tmp_path):
    assert run("variants=[{label: a, pruner: none}]", output=tmp_path) == 0
    folder = tmp_path / "run"
    (record,) = lines(folder / "results.jsonl")
    path = folder / "outcomes" / f"{record['key']}.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    (folder / "results.jsonl").unlink()
    assert run("variants=[{label: a, pruner: none}]", output=tmp_path) == 0
    assert path.read_bytes() == whole
    assert len((folder / "outcomes" / f"{path.name}.torn").read_bytes().splitlines()) == 1


def test_a_killed_run_goes_on_at_the_sample_where_it_was(tmp_path):
    wanted = ["variants=[{label: a, pruner: none}]", "data.scenes=60", "logger=none", f"output={tmp_path}"]
    process = subprocess.Popen(
        command(*wanted, "trainer.batch_size=1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (found := list(tmp_path.glob("run/outcomes/*.jsonl"))) or found[0].stat().st_size < 5000:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline, "no outcome within two minutes"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = found[0].read_bytes()
    before = before[: before.rindex(b"\n") + 1]
    answered = before.count(b"\n")
    assert 0 < answered < 480
    assert not (tmp_path / "run" / "results.jsonl").exists()

    assert run(*wanted[:2], "logger=none", output=tmp_path, quick=False) == 0
    (record,) = lines(tmp_path / "run" / "results.jsonl")
    after = (tmp_path / "run" / "outcomes" / f"{record['key']}.jsonl").read_bytes()
    assert after.startswith(before), "what the killed run had answered was not kept"
    assert record["metrics"]["accuracy"]["n"] == 480
    assert len({outcome["id"] for outcome in outcomes(tmp_path / "run", record)}) == 480


def test_keys_given_on_the_command_line_reach_the_rows_and_change_their_keys(tmp_path):
    rows = "variants=[{label: unpruned, pruner: none}, {label: ours}, {label: other, group: 2}]"
    for tau in (0.2, 0.3):
        assert run(rows, f"pruner.tau={tau}", "data.limit=5", output=tmp_path) == 0
    records = lines(tmp_path / "run" / "results.jsonl")
    assert [record["label"] for record in records] == ["unpruned", "ours", "other", "ours", "other"]
    assert [record["pruner"].get("tau") for record in records] == [None, 0.2, 0.2, 0.3, 0.3]
    assert len({record["key"] for record in records}) == 5, "the unpruned row is the same, the others are not"


@pytest.mark.parametrize("pruner", ["ivtp", "random", "tome"])
def test_the_size_of_a_batch_changes_no_outcome(tmp_path, pruner):
    found = []
    for size in (1, 7, 20):
        rows = f"variants=[{{label: a, pruner: {pruner}}}]"
        assert run(rows, f"trainer.batch_size={size}", output=tmp_path / str(size)) == 0
        (record,) = lines(tmp_path / str(size) / "run" / "results.jsonl")
        said = outcomes(tmp_path / str(size) / "run", record)
        found.append([(o["id"], o["prediction"], o["kept"], o["early"]) for o in said])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("faster", [["trainer.sort=true", "trainer.vision_batch=2"], ["trainer.pack=true"]], ids=str)
def test_what_makes_a_run_faster_changes_no_outcome_and_not_their_order(tmp_path, faster):
    """Paired tests, and a run that goes on, read the outcomes in the order of the data."""
    found = []
    for name, more in (("plain", []), ("faster", faster)):
        rows = "variants=[{label: a, pruner: ivtp}]"
        assert run(rows, "trainer.batch_size=3", *more, output=tmp_path / name) == 0
        (record,) = lines(tmp_path / name / "run" / "results.jsonl")
        found.append([record["key"], record["metrics"], outcomes(tmp_path / name / "run", record)])
    plain, other = found
    words = [[score for outcome in row for _, score in outcome.pop("words")] for row in (plain[2], other[2])]
    assert words[0] == pytest.approx(words[1], abs=2e-4)  # cosines, rounded to four places
    assert plain == other


def test_results_go_where_output_says_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("data.limit=5", output=tmp_path / "else where") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["else where"]
    assert {path.name for path in (tmp_path / "else where" / "run").iterdir()} >= {
        "results.jsonl",
        "outcomes",
        "table.md",
    }


def test_the_default_output_is_a_folder_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("data.limit=5") == 0
    assert (tmp_path / "outputs" / "run" / "results.jsonl").is_file()


def test_help_lists_every_group_and_option(capsys):
    from ivtp.experiment.config import GROUPS, options

    assert run("--help", quick=False) == 0
    shown = capsys.readouterr().out
    for group in GROUPS:
        assert f"{group}=" in shown
        for option in options(group):
            assert option in shown


def test_ctrl_c_leaves_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ivtp.experiment.run.run", interrupted)
    assert run() == 130
    assert capsys.readouterr().err == "ivtp: stopped; the same command goes on from here\n"
