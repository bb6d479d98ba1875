"""Multiruns: a folder per job that goes on, one report over the jobs; reports over several runs; launchers, sweepers."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.running import by_label, lines, one_line, outcomes, run

from ivtp.experiment.multirun import job_folder
from ivtp.experiment.run import adopt
from ivtp.report.__main__ import main as report

TWO = ("pruner=topk,random", "budget.keep=20", "data.limit=4", "logger=none", "viewer=2")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Multirun of two jobs."""
    place = tmp_path_factory.mktemp("sweep")
    assert run("-m", *TWO, f"output={place}", quick=False) == 0
    return place / "run"


def test_a_multirun_has_a_folder_per_job_and_one_report_over_them(swept):
    jobs = ["pruner=random,budget.keep=20,data.limit=4,viewer=2", "pruner=topk,budget.keep=20,data.limit=4,viewer=2"]
    assert sorted(path.name for path in swept.iterdir()) == ["merged", "multirun.yaml", *jobs]
    merged = by_label(swept / "merged")
    assert list(merged) == ["unpruned", "topk", "random"]
    for label, job in (("random", jobs[0]), ("topk", jobs[1])):
        assert merged[label] == by_label(swept / job)[label]
        assert outcomes(swept / "merged", merged[label]) == outcomes(swept / job, merged[label])
    table = (swept / "merged" / "table.md").read_text()
    assert "| − unpruned | − topk |" in table and "| random |" in table
    comparison = json.loads((swept / "merged" / "comparisons.json").read_text())["random"]["topk"]
    assert comparison["n"] == 4 and comparison["p"] is not None
    assert (swept / "merged" / "report.html").is_file()
    assert list((swept / "merged" / "viewer").glob("*.webp"))


def test_the_unpruned_row_is_evaluated_by_the_first_job_alone(swept):
    rows = [by_label(folder)["unpruned"] for folder in swept.glob("pruner=*")]
    assert rows[0]["key"] == rows[1]["key"] and rows[0]["time"] == rows[1]["time"]


def test_the_same_multirun_again_evaluates_nothing(swept, tmp_path, monkeypatch, capsys):
    shutil.copytree(swept, tmp_path / "run")

    def never(*_, **__):
        raise AssertionError("a finished row was evaluated again")

    monkeypatch.setattr("lightning.Trainer.test", never)
    assert run("-m", *TWO, f"output={tmp_path}", quick=False) == 0
    assert capsys.readouterr().out.count("all 2 rows have results already") == 2
    assert by_label(tmp_path / "run" / "merged") == by_label(swept / "merged")


def test_a_job_that_fails_does_not_take_the_others_down(tmp_path, capfd):
    """It is named, the others are merged, and the status is that of a request that cannot be met."""
    wanted = ["pruner=topk", "budget.keep=999,20", "data.limit=2", "logger=none", f"output={tmp_path}"]
    assert run("-m", *wanted, quick=False) == 2
    said = capfd.readouterr()
    assert "pruner=topk,budget.keep=999,data.limit=2: row 'topk': keep=999" in said.out
    assert "ivtp: 1 of 2 jobs failed; the first, pruner=topk,budget.keep=999" in said.err
    assert "Traceback" not in said.err
    assert list(by_label(tmp_path / "run" / "merged")) == ["unpruned", "topk"]


def test_rows_of_one_name_are_told_apart_by_what_was_swept(tmp_path):
    wanted = ["pruner=topk", "budget.keep=20,40", "data.limit=2", "logger=none", f"output={tmp_path}"]
    assert run("-m", *wanted, quick=False) == 0
    rows = by_label(tmp_path / "run" / "merged")
    assert list(rows) == ["unpruned", "topk, budget.keep=20", "topk, budget.keep=40"]
    assert rows["topk, budget.keep=20"]["series"] == rows["topk, budget.keep=40"]["series"]  # one line of the plot


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["pruner=topk", "output=x", "logger=none", "name=y"], "pruner=topk"),
        ([], "job"),
        (["model.source=a/b"], "model.source=a_b-"),
        (["variants=[{label: 'ä b', pruner: none}]"], "variants=_label_b_,_pruner_none-"),
        (["data.path=" + "x" * 300], "data.path=xxxx"),
        (["data.path=../../up"], "data.path=.._.._up-"),
    ],
)
def test_the_folder_of_a_job_is_a_name_on_any_file_system(overrides, name):
    found = job_folder(overrides)
    assert found.startswith(name) and found == job_folder(overrides)
    assert len(found) < 150 and not set(found) & set(" /\\:*?\"'<>|[]{}")


def test_other_values_never_share_a_folder():
    assert job_folder(["model.source=a/b"]) != job_folder(["model.source=a_b"]) != job_folder(["model.source=a:b"])


# Reports over several runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(swept, tmp_path_factory):
    """Folders of two runs on the same questions, and of one on others."""
    (first, second), output = sorted(swept.glob("pruner=*")), tmp_path_factory.mktemp("other")
    assert run("pruner=none", "data.limit=2", "logger=none", f"output={output}", quick=False) == 0
    return first, second, output / "run"


def test_runs_are_compared_by_one_command(runs, tmp_path, capsys):
    first, second, _ = runs
    output = tmp_path / "both"
    assert report([str(first), str(second), f"output={output}"]) == 0
    assert "− random" in capsys.readouterr().out
    assert list(by_label(output)) == ["unpruned", "random", "topk"]
    assert report([str(output), "compare_to=topk"]) == 0  # it is a folder of results like any other
    assert "− topk" in capsys.readouterr().out


def test_runs_on_other_questions_are_refused(runs, tmp_path, capfd):
    """A paired test between them would pair nothing, or the wrong answers."""
    first, _, other = runs
    assert report([str(first), str(other), f"output={tmp_path / 'both'}"]) == 2
    line = one_line(capfd.readouterr().err)
    assert f"{other} has another data than {first}" in line and "limit=2, not 4" in line
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["compare_to=topp"], "Did you mean 'topk'?"),
        (["outputt=x"], "Did you mean 'output'?"),
        (["output={first}"], "is one of the folders that are merged"),
        (["/nowhere"], "/nowhere has no results.jsonl"),
    ],
)
def test_a_report_that_cannot_be_is_refused(runs, more, said, capfd):
    first, second, _ = runs
    before = (first / "results.jsonl").read_bytes()
    assert report([str(first), str(second), *(one.format(first=first) for one in more)]) == 2
    assert said in one_line(capfd.readouterr().err)
    assert (first / "results.jsonl").read_bytes() == before


# Launchers and sweepers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugin", "launcher", "pruners"),
    [
        ("hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], "topk,random"),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"], "topk"),
    ],
)
def test_jobs_in_other_processes_end_in_the_same_report(plugin, launcher, pruners, tmp_path, swept):
    pytest.importorskip(
        f"hydra_plugins.{plugin}", reason="launchers and sweepers are the extra sweep, a part of the dev extra"
    )
    assert run("-m", *TWO[1:], f"pruner={pruners}", *launcher, f"output={tmp_path}", quick=False) == 0
    ours, theirs = by_label(tmp_path / "run" / "merged"), by_label(swept / "merged")
    assert set(ours) == {"unpruned", *pruners.split(",")}
    for label, row in ours.items():
        assert row["metrics"] == theirs[label]["metrics"], label


def test_a_job_on_several_devices_runs_in_processes_of_its_own(tmp_path, swept):
    """Each runs this job alone: the command of a multirun would run all jobs."""
    arguments = ["trainer.devices=2", *TWO[1:], "pruner=topk", f"output={tmp_path}"]
    assert run("-m", *arguments, quick=False) == 0
    rows, alone = by_label(tmp_path / "run" / "merged"), by_label(swept / "merged")
    assert list(rows) == ["unpruned", "topk"]
    for label, row in rows.items():
        assert row["machine"]["ranks"] == 2 and row["metrics"] == alone[label]["metrics"]


def test_an_unpruned_row_is_taken_over_from_a_job_that_may_be_writing(swept, tmp_path):
    """Its files are left alone: a line that looks torn may be on its way to the disk."""
    sibling = shutil.copytree(next(swept.glob("pruner=topk*")), tmp_path / "pruner=topk")
    with open(sibling / "results.jsonl", "ab") as file:
        file.write(b'{"label": "to')
    before = (sibling / "results.jsonl").read_bytes()
    adopt(tmp_path / "pruner=tome", tmp_path)
    assert (sibling / "results.jsonl").read_bytes() == before and not list(sibling.glob("*.torn"))
    assert list(by_label(tmp_path / "pruner=tome")) == ["unpruned"]


def test_a_report_over_runs_is_made_of_whole_outcomes_alone(runs, tmp_path, capfd):
    """Missing outcomes would make paired tests vanish in silence."""
    first, second, _ = runs
    harmed = shutil.copytree(first, tmp_path / "harmed")
    path = next(harmed.glob("outcomes/*.jsonl"))
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert report([str(harmed), str(second), f"output={tmp_path / 'both'}"]) == 2
    assert "does not hold the outcomes of row" in one_line(capfd.readouterr().err)
    assert not (tmp_path / "both").exists()


def test_optuna_looks_for_the_best_accuracy_at_a_cost(tmp_path):
    """At equal FLOPs, which the budget holds; the return value of a job is the accuracy of its last row."""
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper",
        reason="launchers and sweepers are the extra sweep, a part of the dev extra",
    )
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"]
    search += ["hydra.sweeper.sampler.seed=1", "budget.tflops=0.003", "pruner=topk,random", "pruner.group=choice(2,3)"]
    assert run("-m", *search, "data.limit=4", "logger=none", f"output={tmp_path}", quick=False) == 0
    found = (tmp_path / "run" / "optimization_results.yaml").read_text()
    assert "best_value" in found and "pruner.group" in found
    for row in lines(tmp_path / "run" / "merged" / "results.jsonl")[1:]:
        assert row["tflops"]["total"] == pytest.approx(0.003, rel=0.02)
