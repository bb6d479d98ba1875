"""Benchmarks inside the loop give what lmms-eval gives, on every config; what cannot be run is refused in one line."""

from __future__ import annotations

import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from itertools import cycle

import pytest
from benchmark_data import ROWS, SCHEMAS
from benchmarks import CLEAR, caches, command, definition, folder, replay
from omegaconf import OmegaConf
from rich.console import Console

from ivtp import load_model
from ivtp.build import build_data, plan_rows, shape_of
from ivtp.config import FOLDER, load_config
from ivtp.data.lmms import LmmsTask
from ivtp.data.judges import JudgeError
from ivtp.data.lmms_tasks import load_task
from ivtp.data.questions import DataError
from ivtp.evaluation.benchmarks import measured
from ivtp.evaluator import Evaluator
from ivtp.registry import UserError
from ivtp.run import main

CONFIGS = sorted(p.stem for p in (FOLDER / "data").glob("*.yaml") if p.stem not in ("scenes", "folder", "lmms", "images"))
JUDGED = {"llava_in_the_wild", "mmvet", "mmbench_cn"}
FREE = [name for name in CONFIGS if name not in JUDGED]


@pytest.fixture(scope="module", autouse=True)
def _caches():
    with caches() as place:
        yield place


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def config_of(name: str, **changes):
    config = load_config([f"data={name}", "logger=none", "trainer.batch_size=3"])
    OmegaConf.set_struct(config, False)
    config.data.path = str(folder(name))
    config.data.update(changes)
    return config


def task_of(name: str, **changes) -> LmmsTask:
    asked = OmegaConf.to_container(config_of(name, **changes).data)
    task, _ = asked.pop("task"), asked.pop("name")
    return LmmsTask(task, 144, **asked)


def names(found: dict) -> dict:
    """The benchmark's own metrics without the task's name."""
    return {name.partition("/")[2]: metric["mean"] for name, metric in found.items() if "/" in name and "accuracy/" not in name}


def test_the_twelve_benchmarks_have_a_config_and_so_have_their_traps():
    twelve = {
        *("vqav2", "gqa", "vizwiz", "scienceqa_img", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seedbench"),
        *("llava_in_the_wild", "mmvet"),
    }
    assert set(CONFIGS) == twelve | {"textvqa_ocr", "mme_perception"} == set(SCHEMAS) | {"textvqa_ocr", "mme_perception"}


def prepared(task: LmmsTask) -> dict[str, str]:
    """Answers of which some are right, some wrong, some not to be made sense of."""
    some = cycle(["{}", "{}.", "no", "{}", "B. ring", "Yes", "the {} thing"])
    return {name: next(some).format(task._text(place)["answer"] or "zero") for name, place in task.places.items()}


@pytest.mark.parametrize("name", FREE)
def test_the_same_answers_get_the_score_that_lmms_eval_gives(name, tmp_path):
    """A user's number must be comparable with every number that lmms-eval printed elsewhere."""
    task = task_of(name)
    answers = prepared(task)
    outcomes = [
        {"id": key, "image": key, **task.judge(task._text(task.places[key]), text)} for key, text in answers.items()
    ]
    found = names(measured(task.scores(outcomes, tmp_path / "ours")))
    theirs = replay(definition(name), {task.places[key]: text for key, text in answers.items()}, tmp_path / "theirs")
    assert found == pytest.approx(theirs) and theirs
    if name not in ("mmbench",):
        assert any(0 < value < 2000 for value in theirs.values()), "a score of nothing shows nothing"


@pytest.mark.parametrize("name", FREE)
def test_every_config_runs_end_to_end(name, tiny, tmp_path):
    """Documents → prompts → a pruned model → outcomes on disk → the record of the row, with lmms-eval's metrics in it."""
    model, processor = tiny
    changes = {"limit": 6} if name == "seedbench" else {}
    config = config_of(name, **changes)
    data = build_data(config, processor, shape_of(model), 3)
    row = {"label": "topk", "series": "topk", "section": "", "pruner": {"name": "topk"}, "budget": {"keep": 9},
           "position_ids": "keep"}  # fmt: skip
    (planned,) = plan_rows([row], shape_of(model), 12, 10)
    evaluator = Evaluator(model, processor, data, config, tmp_path, Console(file=StringIO()))
    record = evaluator.evaluate("key", planned, "title")
    outcomes = evaluator.read("key")
    assert len(outcomes) == changes.get("limit", ROWS) == len(data.survey.ids)
    assert record["metrics"]["score"]["n"] == (4 if name == "mme_perception" else len(outcomes))
    assert all(len(outcome["kept"]) == 9 and outcome["correct"] is not None for outcome in outcomes)
    answers = {data.source.places[o["id"]]: o["prediction"] for o in outcomes}
    if not changes:
        theirs = replay(definition(name), answers, tmp_path / "theirs")
        assert names(record["metrics"]) == pytest.approx(theirs) and theirs


# The command of lmms-eval ------------------------------------------------------------------------------------------


def printed(text: str) -> list[dict[str, float]]:
    """Metric → value, of each table that lmms-eval printed."""
    tables, values = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "Tasks":
            values = {}
            tables.append(values)
        elif values is not None and len(cells) > 6 and "-" not in cells[0]:
            values[f"{cells[0].removesuffix('_here')}/{cells[3]}"] = float(cells[5])
    return tables


def test_our_loop_and_the_command_of_lmms_eval_print_the_same(_caches, tmp_path):
    """Both ways round, unpruned and pruned, batch of one and of three: one answer to what a pruner costs on a benchmark."""
    ways = {"none": "pruner=none", "ivtp": "pruner=ivtp,keep=3"}
    wanted = ("pope", "vqav2")
    for name in wanted:
        text = json.dumps(definition(name, CLEAR))
        (tmp_path / f"{name}.yaml").write_text(text)
    runs = [
        {"model": "ivtp", "model_args": f"pretrained=tiny,{way},prompt=<image> {{question}}", "tasks": "pope_here,vqav2_val_here",
         "batch_size": batch, "include_path": str(tmp_path), "output_path": str(tmp_path / "theirs")}
        for way, batch in ((ways["none"], 3), (ways["ivtp"], 1), (ways["ivtp"], 3))
    ]  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = command(["--config", str(tmp_path / "runs.json")], _caches)
    assert done.returncode == 0, done.stderr
    dense, one, three = printed(done.stdout)
    assert one == three
    assert dense != one, "pruning to three tokens must show, or this compares nothing"
    assert len(dense) == 6

    ours = {"none": {}, "ivtp": {}}
    for name in wanted:
        arguments = [f"data={name}", f"data.path={folder(name)}", "data.prompt={pre_prompt: '', post_prompt: ''}"]
        rows = "variants=[{label: none, pruner: none}, {label: ivtp, pruner: ivtp, budget: {keep: 3}}]"
        assert main([*arguments, rows, "logger=none", "viewer=0", f"output={tmp_path / name}", "trainer.batch_size=3"]) == 0
        for record in map(json.loads, (tmp_path / name / "run" / "results.jsonl").read_text().splitlines()):
            own = {k: m["mean"] for k, m in record["metrics"].items() if "/" in k and "accuracy/" not in k}
            ours[record["label"]] |= own
    assert ours["none"] == pytest.approx(dense, abs=5e-5)
    assert ours["ivtp"] == pytest.approx(one, abs=5e-5)
