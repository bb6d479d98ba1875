"""Benchmarks inside the loop give what lmms-eval gives, on every config; what cannot be run is refused in one line."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers.benchmark_data import ROWS, SCHEMAS, write
from helpers.benchmarks import CLEAR, caches, command, definition, folder, replay
from omegaconf import OmegaConf
from rich.console import Console

from ivtp import load_model
from ivtp.data.questions import DataError
from ivtp.evaluation.task_metrics import measured
from ivtp.experiment.config import FOLDER, load_config
from ivtp.experiment.planning import build_data, plan_rows, shape_of
from ivtp.experiment.runner import Evaluator
from ivtp.lmms.dataset import LmmsTask, TaskSettings
from ivtp.lmms.judges import JudgeError
from ivtp.lmms.loading import load_task
from ivtp.registry import UserError
from ivtp.run import main

CONFIGS = sorted(path.stem for path in (FOLDER / "data").glob("*.yaml") if "defaults:" in path.read_text())
JUDGED = {"llava_in_the_wild", "mmvet", "mmbench_cn"}
FREE = [name for name in CONFIGS if name not in JUDGED]


@pytest.fixture(scope="module", autouse=True)
def prepared_in():
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


def task_of(name: str, chat: bool = False, **changes) -> LmmsTask:
    settings = OmegaConf.to_container(config_of(name, **changes).data)
    task, _ = settings.pop("task"), settings.pop("name")
    return LmmsTask(task, 324, TaskSettings(**settings), chat=chat)


def names(found: dict) -> dict:
    """The metrics that lmms-eval has, without the task's name."""
    return {
        name.partition("/")[2]: metric["mean"]
        for name, metric in found.items()
        if "/" in name and "accuracy/" not in name and "macro average" not in name
    }


def test_the_twelve_benchmarks_have_a_config_and_so_have_their_traps():
    twelve = {
        *("vqav2", "gqa", "vizwiz", "scienceqa_img", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seedbench"),
        *("llava_in_the_wild", "mmvet"),
    }
    assert (
        set(CONFIGS) == twelve | {"textvqa_ocr", "mme_perception"} == set(SCHEMAS) | {"textvqa_ocr", "mme_perception"}
    )


def prepared(task: LmmsTask) -> dict[str, str]:
    """Answers of which some are right, some wrong, some not to be made sense of."""
    some = cycle(["{}", "{}.", "no", "<think>no, or yes</think>{}", "B. ring", "Yes", "the {} thing"])
    right = {
        place: task._text(place)["answer"] or task.task.eval_docs[place]["answers"][0]
        for place in task.indices.values()
    }
    return {name: next(some).format(right[place]) for name, place in task.indices.items()}


@pytest.mark.parametrize("name", FREE)
def test_the_same_answers_get_the_score_that_lmms_eval_gives(name, tmp_path):
    """A user's number must be comparable with every number that lmms-eval printed elsewhere."""
    task = task_of(name)
    answers = prepared(task)
    outcomes = [
        {"id": key, "image": key, **task.scorer(task._text(task.indices[key]), text)} for key, text in answers.items()
    ]
    found = names(measured(task.scores(outcomes, tmp_path / "ours")))
    theirs = replay(definition(name), {task.indices[key]: text for key, text in answers.items()}, tmp_path / "theirs")
    assert found == pytest.approx(theirs) and theirs
    if name not in ("mmbench",):
        assert any(0 < value < 2000 for value in theirs.values()), "a score of nothing shows nothing"


def three_f1(outcomes: list[dict]) -> float:
    """The mean of the F1 of each sampling, by its definition: the number that papers call POPE."""
    found = []
    for category in ("adversarial", "popular", "random"):
        own = [o for o in outcomes if o["family"] == category]
        yes = [(o["prediction"].lower() == "yes", o["answer"] == "yes") for o in own]
        hits, said, true = (sum(map(f, yes)) for f in (all, lambda p: p[0], lambda p: p[1]))
        found.append(2 * hits / (said + true))
    return sum(found) / 3


def test_pope_is_the_mean_of_three_f1_beside_the_one_of_lmms_eval(tmp_path):
    """85.9 of LLaVA-1.5 is that mean; one F1 over all questions is another number."""
    task = task_of("pope")
    answers = ["yes", "Yes", "yes", "yes", "yes", "no", "Yes", "no"]
    outcomes = [
        {"image": str(place), **task._text(place), **task.scorer(task._text(place), answers[place])}
        for place in range(ROWS)
    ]
    found = measured(task.scores(outcomes, tmp_path))
    name, single = "pope/pope_f1_score, macro average", "pope/pope_f1_score"
    assert found[name]["mean"] == pytest.approx(three_f1(outcomes)) != found[single]["mean"]
    assert found["score"] == {**found[name], "name": name}
    # Delete one of eight images in turn (the jackknife); the error of the mean, not of one F1.
    without = [three_f1([o for o in outcomes if o is not left]) for left in outcomes]
    mean = sum(without) / ROWS
    error = ((ROWS - 1) / ROWS * sum((x - mean) ** 2 for x in without)) ** 0.5
    assert found[name]["se"] == pytest.approx(error) != found[single]["se"]
    with pytest.raises(DataError, match=r"name their column, as in data\.family=category"):
        task_of("pope", family=None)


PUBLISHED = {
    **dict.fromkeys(
        ("vqav2", "gqa", "textvqa", "pope", "mme", "mme_perception"),
        "\nAnswer the question using a single word or phrase.",
    ),
    "textvqa_ocr": "\nReference OCR token: $64, red\nAnswer the question using a single word or phrase.",
    "vizwiz": "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase.",
    "scienceqa_img": "\nD. black\nAnswer with the option's letter from the given choices directly.",
    "mmbench": "\nD. black\nAnswer with the option's letter from the given choices directly.",
    "mmbench_cn": "\nD. black\n请直接回答选项字母。",
    "seedbench": "\nD. black\nAnswer with the option's letter from the given choices directly.",
    "llava_in_the_wild": "?",
    "mmvet": "?",
}
"""How the prompts end that LLaVA-1.5's published numbers were made with (its docs/Evaluation.md and scripts/v1_5/eval)."""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_asks_as_the_published_numbers_do(name):
    """Another prompt is another number: MM-Vet step by step, MMBench in other words."""
    c = config_of(name).data
    task = load_task(c.task, c.path, c.preset, c.prompt, judge={"MODEL_VERSION": "none", "OPENAI_API_KEY": "none"})
    doc = task.eval_docs[0]
    text = task.doc_to_text(doc)
    assert text.endswith(PUBLISHED[name]) and "step" not in text
    if name not in ("mmbench", "mmbench_cn", "scienceqa_img", "seedbench"):  # those have options between
        assert text.lower() == (doc["question"].removesuffix("?") + "?" + PUBLISHED[name].removeprefix("?")).lower()


def test_llava_is_asked_in_the_words_of_its_published_numbers():
    """Vicuna's system sentence and turns, letter by letter what lmms-eval's own LLaVA renders."""
    import lmms_eval
    from jinja2 import Template

    source = (Path(lmms_eval.__path__[0]) / "models" / "simple" / "llava_hf.py").read_text()
    template = next(line for line in source.splitlines() if line.startswith("VICUNA_CHAT_TEMPLATE")).partition(" = ")[2]
    message = [{"role": "user", "content": "<image>\n{question}"}]
    text = Template(json.loads(template)).render(messages=message, add_generation_prompt=True)
    for name in ("llava_1_5_7b", "llava_1_5_13b", "llava_next_7b"):
        assert load_config([f"model={name}"]).model.prompt == text


def test_the_plugin_pads_where_it_is_told_to():
    from ivtp.cli.lmms_eval import Ivtp

    padded = Ivtp("tiny", pruner="none", image_padding="pad").processor.image_processor
    assert padded.do_pad and not getattr(Ivtp("tiny", pruner="none").processor.image_processor, "do_pad", False)


@pytest.mark.parametrize("token", [None, "hf_somebody"])
def test_no_login_is_needed_for_what_a_task_loads_besides_its_documents(token, monkeypatch, tmp_path):
    """GQA's images are a second data set, GQA-ru's are loaded when a document is request_fields; both with token=True."""
    import datasets.load
    import huggingface_hub

    build, tokens = datasets.load.load_dataset_builder, []

    def spy(path, name=None, **more):
        assert Path(path).is_dir(), f"{path} is on the hub"
        tokens.append(more.get("token"))
        huggingface_hub.utils.build_hf_headers(token=more.get("token"))  # raises for True without a login
        return build(path, name, **more)

    monkeypatch.setattr(datasets.load, "load_dataset_builder", spy)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    copy = write("gqa", tmp_path)  # of its own: what is prepared already would not be loaded
    for name in ("gqa", "gqa-ru"):
        task = LmmsTask(name, 324, TaskSettings(path=str(copy)))
        request_fields = [task[place]["images"] for place in range(ROWS)]
        assert [image.size for (image,) in request_fields] == [(144, 144)] * ROWS
    assert tokens == ([True] * 4 if token else [None] * 4)
    assert datasets.load.load_dataset_builder is spy


def test_an_answer_ends_where_the_task_says():
    task = task_of("textvqa")
    judged = task.scorer(task[0], f"{task[0]['answer']} ASSISTANT: no")
    assert (judged["prediction"], judged["correct"]) == (task[0]["answer"], True)


@pytest.mark.parametrize("name", FREE)
def test_every_config_runs_end_to_end(name, tiny, tmp_path):
    """Documents → prompts → a pruned model → outcomes on disk → the record of the row, with lmms-eval's metrics in it."""
    model, processor = tiny
    config = config_of(name)
    data = build_data(config, processor, shape_of(model), 3)
    row = {"label": "topk", "series": "topk", "section": "", "pruner": {"name": "topk"}, "budget": {"keep": 9},
           "position_ids": "keep"}  # fmt: skip
    (planned,) = plan_rows([row], shape_of(model), 12, 10)
    evaluator = Evaluator(model, processor, data, config, tmp_path, Console(file=StringIO()))
    record = evaluator.evaluate(replace(planned, key="key"), "title")
    outcomes = evaluator.read("key")
    assert len(outcomes) == ROWS == len(data.survey.ids)
    assert record.metrics["score"]["n"] == (4 if name == "mme_perception" else len(outcomes))
    images = [len(data.source[place]["images"]) for place in range(ROWS)]
    assert [len(outcome["kept"]) for outcome in outcomes] == [9 * n for n in images]
    assert (set(images) == {1, 2}) == (name == "seedbench")
    assert sum(outcome["correct"] is not None for outcome in outcomes) == record.metrics["score"]["n"]
    answers = {data.source.indices[o["id"]]: o["prediction"] for o in outcomes}
    theirs = replay(definition(name), answers, tmp_path / "theirs")
    assert names(record.metrics) == pytest.approx(theirs) and theirs


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


def test_our_loop_and_the_command_of_lmms_eval_print_the_same(prepared_in, tmp_path):
    """Both ways round, unpruned and pruned, in batches of one and of three: one answer to what a pruner costs on a benchmark."""
    ways = {"none": "pruner=none", "ivtp": "pruner=ivtp,keep=3"}
    wanted = ("pope", "vqav2")
    for name in wanted:
        text = json.dumps(definition(name, CLEAR))
        (tmp_path / f"{name}.yaml").write_text(text)
    runs = [
        {"model": "ivtp", "model_args": f"pretrained=tiny,{way},prompt=<image> {{question}}", "tasks": "pope_here,vqav2_val_here",
         "batch_size": batch, "include_path": str(tmp_path), "output_path": str(tmp_path / "theirs")}
        for way, batch in ((ways["none"], 3), (ways["ivtp"], 1))
    ]  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = command(["--config", str(tmp_path / "runs.json")], prepared_in)
    assert done.returncode == 0, done.stderr
    dense, pruned = printed(done.stdout)
    assert dense != pruned, "pruning to three tokens must show, or this compares nothing"
    assert len(dense) == 6

    ours = {"none": {}, "ivtp": {}}
    for name in wanted:
        arguments = [f"data={name}", f"data.path={folder(name)}", "data.prompt={pre_prompt: '', post_prompt: ''}"]
        rows = "variants=[{label: none, pruner: none}, {label: ivtp, pruner: ivtp, budget: {keep: 3}}]"
        assert (
            main([*arguments, rows, "logger=none", "viewer=0", f"output={tmp_path / name}", "trainer.batch_size=3"])
            == 0
        )
        for record in map(json.loads, (tmp_path / name / "run" / "results.jsonl").read_text().splitlines()):
            task = next(k for k in record["metrics"] if "/" in k and "accuracy/" not in k).partition("/")[0]
            ours[record["label"]] |= {f"{task}/{k}": value for k, value in names(record["metrics"]).items()}
    assert ours["none"] == pytest.approx(dense, abs=5e-5)
    assert ours["ivtp"] == pytest.approx(pruned, abs=5e-5)


def test_two_processes_of_the_plugin_answer_as_one(prepared_in, tmp_path):
    """torchrun and accelerate give each its share of the requests, and the last one again to those that have fewer."""
    from ivtp.cli.lmms_eval import Ivtp

    task = task_of("vqav2", prompt=CLEAR)
    lm = Ivtp("tiny", pruner="ivtp", ratio="1/9", prompt="<image> {question}")
    lm.task_dict["vqav2_val"] = task.task.dataset
    for request in task.requests:
        request.arguments = (request.args[0], {**request.args[1], "max_new_tokens": 2}, *request.args[2:])
    alone = lm.generate_until(task.requests[:7])
    (tmp_path / "vqav2.yaml").write_text(json.dumps(definition("vqav2", CLEAR)))
    arguments = {
        "model": "ivtp",
        "model_args": "pretrained=tiny,pruner=ivtp,ratio=1/9,prompt=<image> {question}",
        "tasks": "vqav2_val_here",
        "limit": 7,
        "gen_kwargs": "max_new_tokens=2",
        "include_path": tmp_path,
        "output_path": tmp_path,
    }
    given = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    done = command([*given, "--log_samples"], prepared_in, ranks=2)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("*_samples_*.jsonl")
    logged = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, file.read_text().splitlines())}
    assert [logged[number] for number in range(7)] == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("prompt", ["<image> {question}", "chat"])
def test_a_batch_of_requests_is_answered_as_each_alone(prompt, tiny, tmp_path):
    """lmms-eval's own models lose points in batches (its issue 635); and what it asks is what our loop asks."""
    from ivtp.cli.lmms_eval import Ivtp
    from ivtp.data.datamodule import Collate
    from ivtp.evaluation.answering import respond

    task = task_of("gqa", prompt=CLEAR, chat=prompt == "chat")
    answers = {}
    for size in (1, 3):
        lm = Ivtp("tiny", pruner="ivtp", keep=3, prompt=prompt, batch_size=size)
        assert lm.is_simple == (prompt != "chat")
        lm.task_dict["gqa"] = task.task.dataset
        answers[size] = lm.generate_until(task.requests)
    assert answers[1] == answers[3]
    assert len(set(answers[1])) > 2
    batch = Collate(tiny[1], prompt)([task[i] for i in range(ROWS)])
    with torch.inference_mode():
        ours, *_ = respond(*tiny, lm.pruner, batch, task.generation)
    assert ours == answers[1]


def test_the_plugin_takes_what_a_run_takes(monkeypatch):
    """Its arguments arrive as numbers, texts and truths; those of loading go to the loader, the others to the pruner."""
    from ivtp.cli import lmms_eval

    given, load = {}, lmms_eval.load_model
    monkeypatch.setattr(
        lmms_eval, "load_model", lambda source, **more: given.update(more) or load(source, device="cpu")
    )
    more = "pretrained=tiny,pruner=topk,ratio=1/9,device_map=auto,load_in_4bit=True,max_pixels=50176,dtype=float16"
    lm = lmms_eval.Ivtp.create_from_arg_string(more, {"batch_size": 2, "device": "cpu"})
    assert given == {
        "device": "cpu",
        "device_map": "auto",
        "load_in_4bit": True,
        "max_pixels": 50176,
        "dtype": "float16",
    }
    assert lm.pruner.outline.vision.schedule[-1].keep == 36
    for ratio in (2, 0, "a"):
        with pytest.raises(UserError, match=f"ratio='?{ratio}'? "):
            lmms_eval.Ivtp("tiny", pruner="topk", ratio=ratio)
    with pytest.raises(UserError, match=r"keep=3 and ratio=0\.5 are both given; choose one"):
        lmms_eval.Ivtp("tiny", pruner="topk", ratio=0.5, keep=3)


def test_each_process_of_the_plugin_takes_a_gpu_of_its_own(monkeypatch):
    from ivtp.cli.lmms_eval import device_of_rank

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [str(device_of_rank(name)) for name in (None, "cuda", "cuda:3", "cpu")] == [
        "cuda:0",
        "cuda:0",
        "cuda:3",
        "cpu",
    ]
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert [str(device_of_rank(name)) for name in (None, "cuda", "cpu")] == ["cuda:5", "cuda:5", "cpu"]
    with pytest.raises(UserError, match="device=cuda:3 would hold all 8 processes; leave it out"):
        device_of_rank("cuda:3")


def test_a_request_that_cannot_be_shown_is_named():
    from ivtp.cli.lmms_eval import Ivtp

    task = task_of("pope")
    lm = Ivtp("tiny", pruner="none", prompt="<image> {question}", batch_size=2)
    lm.task_dict["pope"] = task.task.dataset
    request = task.requests[1]
    request.arguments = (*request.args[:2], lambda doc: ["a film"], *request.args[3:])
    with pytest.raises(UserError, match=r"sample 'pope-000001' cannot be read: .*it shows a str"):
        lm.generate_until(task.requests)


def test_lmms_eval_s_command_is_told_in_words_what_cannot_be():
    from ivtp.cli.lmms_eval import Ivtp

    with pytest.raises(UserError, match="batch_size=auto must be a whole number"):
        Ivtp("tiny", batch_size="auto")
    with pytest.raises(UserError, match="kep"):
        Ivtp("tiny", pruner="topk", kep=3)
    for kind in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(UserError, match="answers"):
            getattr(Ivtp("tiny", pruner="none", prompt="<image> {question}"), kind)([])


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("pop", "unknown task of lmms-eval: 'pop'. Did you mean 'pope'?"),
        ("vqav2", "'vqav2' is a group of lmms-eval, not one task; choose of vqav2_val, vqav2_test"),
        ("seedbench_ppl", "of the kind 'multiple_choice'; here a model answers one prompt"),
        ("videomme", "asks about videos; only images can be pruned here"),
        ("vstat", "is a python task of lmms-eval"),
        ("mmmu_val_pass64", "samples 64 answers to each question"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_with_the_reason(task, said):
    with pytest.raises(UserError) as error:
        load_task(task)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "/no/folder"}, "data.path=/no/folder does not exist; give a folder with a copy of lmms-lab"),
        (
            {"path": None},
            "offline, give data.path=FOLDER, a copy made by `hf download lmms-lab-encoder/POPE --repo-type dataset",
        ),
        ({"preset": "qwen"}, "unknown prompt preset of task 'pope': 'qwen'"),
        (
            {"prompt": {"post": "x"}},
            "unknown setting of the prompt of task 'pope': 'post'. Did you mean 'post_prompt'?",
        ),
        ({"metric": "f1"}, "unknown metric of task 'pope': 'f1'"),
        ({"family": "kind"}, "unknown column of task 'pope': 'kind'"),
        ({"judge": {"OPENAI_API_KEY": "x"}}, "configs are recorded; leave OPENAI_API_KEY in the environment"),
        ({"generation": {"do_sample": True}}, "samples its answers"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_the_reason(changes, said):
    with pytest.raises(UserError) as error:
        task_of("pope", **changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_documents_of_another_schema_are_refused_before_any_model_works():
    with pytest.raises(DataError, match=r"of task 'pope': it has no split 'test', but validation"):
        task_of("pope", path=str(folder("textvqa")))
    with pytest.raises(DataError, match="of task 'scienceqa_img': KeyError: 'hint'"):
        task_of("scienceqa_img", path=str(folder("pope")))


def test_what_a_document_shows_besides_images_is_refused_with_the_reason():
    from ivtp.lmms.dataset import request_fields

    with pytest.raises(DataError, match="it shows a str, and only images"):
        request_fields(["video.mp4"], "what ?", False)
    messages = [
        {"role": "user", "content": [{"type": "audio", "url": {"array": []}}, {"type": "text", "text": "what ?"}]}
    ]
    with pytest.raises(DataError, match="it shows a dict"):
        request_fields(messages, "what ?", True)
    assert request_fields(None, "what ?", False) == {"question": "what ?", "images": []}


def test_without_lmms_eval_it_says_what_to_install(monkeypatch):
    from ivtp.lmms import loading as lmms_tasks

    lmms_tasks.task_index.cache_clear()
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(DataError, match=r'pip install "ivtp\[lmms\]"'):
        load_task("pope")


def test_a_task_whose_module_lacks_something_names_it(monkeypatch):
    """Not every file of every task is in the wheel of lmms-eval, nor every package that tasks import."""
    monkeypatch.setitem(sys.modules, "statistics", None)
    with pytest.raises(DataError, match=r"task 'vqav2_val' of lmms-eval cannot be loaded: .*statistics"):
        load_task("vqav2_val")


# Judges -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A judge on this machine, which speaks the protocol of OpenAI; what it is asked, and what it says."""
    asked, says = [], {"status": 200, "text": "0.7"}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"])
            message = {"role": "assistant", "content": says["text"]}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "made-up", "usage": None,
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
            self.send_response(says["status"])
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_API_KEY", "none of ours")
        yield f"http://127.0.0.1:{http.server_port}", asked, says
        http.shutdown()


@pytest.mark.parametrize("name", sorted(JUDGED))
def test_a_judged_task_without_a_judge_is_refused_before_any_model_works(name, monkeypatch):
    """lmms-eval itself would score zero, or a random option, and say nothing in the result."""
    monkeypatch.setenv("OPENAI_API_KEY", "one that is there for something else")
    with pytest.raises(JudgeError, match="asks a judge, a model behind an API; name one"):
        task_of(name)


@pytest.mark.parametrize(("name", "says"), [("llava_in_the_wild", "8 6"), ("mmvet", "0.7"), ("mmbench_cn", "C")])
def test_with_a_judge_the_score_is_the_one_that_lmms_eval_gives(name, says, server, monkeypatch, tmp_path):
    url, asked, answer = server
    answer["text"] = says
    where = f"{url}/v1/chat/completions" if name == "mmbench_cn" else f"{url}/v1"
    judge = {"MODEL_VERSION": "made-up", "OPENAI_API_URL": where}
    task = task_of(name, judge=judge)
    assert asked, "the judge was not tried before the run"
    answers = prepared(task)
    outcomes = [
        {"id": key, "image": key, **task.scorer(task._text(task.indices[key]), text)} for key, text in answers.items()
    ]
    found = names(measured(task.scores(outcomes, tmp_path / "ours")))
    for variable, value in judge.items():
        monkeypatch.setenv(variable, value)
    theirs = replay(definition(name), {task.indices[key]: text for key, text in answers.items()}, tmp_path / "theirs")
    assert found == pytest.approx(theirs) and theirs


def test_a_judge_that_fails_stops_the_run_and_scores_nothing(server, monkeypatch):
    url, _, says = server
    says["status"] = 404
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(JudgeError, match=r"the judge of task 'mmvet' failed: .*404"):
        task_of("mmvet", judge={"MODEL_VERSION": "made-up", "OPENAI_API_URL": f"{url}/v1"})


# Runs that stop, and errors of metrics -------------------------------------------------------------------------------


def test_a_run_that_stopped_goes_on_and_gives_the_same(tmp_path):
    arguments = [
        "data=mme",
        f"data.path={folder('mme')}",
        "data.prompt={post_prompt: ''}",
        "pruner=topk",
        "budget.keep=4",
    ]
    more = ["logger=none", "viewer=0", "trainer.batch_size=3", f"output={tmp_path}"]
    assert main([*arguments, *more]) == 0
    results = tmp_path / "run" / "results.jsonl"
    before = [json.loads(line) for line in results.read_text().splitlines()]
    results.unlink()
    for record in before:
        path = tmp_path / "run" / "outcomes" / f"{record['key']}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert main([*arguments, *more]) == 0
    after = [json.loads(line) for line in results.read_text().splitlines()]
    assert [r["metrics"] for r in after] == [r["metrics"] for r in before]
    assert before[0]["metrics"]["score"]["name"] == "mme/mme_perception_score + mme/mme_cognition_score"
    assert before[0]["data"]["lmms_eval"] and before[0]["data"]["split"] == "test"
    table = (tmp_path / "run" / "table.md").read_text()
    assert "mme_perception_score" in table and "of dense" in table


def test_a_percentage_of_the_baseline_needs_a_dense_run(tmp_path):
    """Compared with somebody else's baseline, a percentage says what other code and another prompt do."""
    arguments = ["data=mme", f"data.path={folder('mme')}", "logger=none", "viewer=0", f"output={tmp_path}"]
    assert main([*arguments, "variants=[{label: only, pruner: topk, budget: {keep: 4}}]"]) == 0
    table = (tmp_path / "run" / "table.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| only"))
    assert row.count("no dense run") == 2 and "no dense run" in (tmp_path / "run" / "report.html").read_text()


def test_questions_without_an_image_are_asked_as_text(tmp_path, tiny):
    """ScienceQA whole: half of it shows nothing; its score is that of all of it."""
    from datasets import Dataset, Features, Image
    from helpers.benchmark_data import scene, scienceqa

    rows = [scienceqa(i, *scene(i)) | ({"image": None} if i % 2 else {}) for i in range(ROWS)]
    made = Dataset.from_list(rows)
    path = tmp_path / "ScienceQA-FULL" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    made.cast(Features({**made.features, "image": Image()})).to_parquet(path)
    arguments = ["data=lmms", "data.task=scienceqa", f"data.path={tmp_path}", "data.prompt={post_prompt: ''}"]
    more = ["pruner=topk", "budget.keep=4", "logger=none", "trainer.batch_size=3", f"output={tmp_path / 'out'}"]
    assert main([*arguments, *more]) == 0
    results = (tmp_path / "out" / "run" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"]["scienceqa/exact_match"]["n"] for line in results] == [ROWS, ROWS]
    key = json.loads(results[1])["key"]
    outcomes = [
        json.loads(x) for x in (tmp_path / "out" / "run" / "outcomes" / f"{key}.jsonl").read_text().splitlines()
    ]
    assert [outcome["kept"] and len(outcome["kept"]) for outcome in outcomes] == [4, None] * 4


def test_lmms_eval_changes_nothing_for_other_data():
    """It sets for the whole process that half an image is opened without a word."""
    import subprocess

    code = (
        "from PIL import ImageFile; from ivtp.lmms.loading import task_index; assert 'pope' in task_index()\n"
        "import lmms_eval.api.task; assert ImageFile.LOAD_TRUNCATED_IMAGES is False"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_every_family_answers_in_its_own_chat_template(kind, tmp_path):
    """Messages with one and two images through a real processor, in batches as alone; every image has its own budget."""
    from helpers.families import family

    model, processor, image = family(kind)
    template = (
        "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}A:"
    )
    with patch.object(processor, "chat_template", template.replace("IMAGE", image)):
        found = {}
        for size in (1, 3):
            config = config_of("seedbench", generation={"max_new_tokens": 2})
            config.model.prompt = "chat"
            data = build_data(config, processor, shape_of(model), size)
            row = {"label": "fastv", "series": "fastv", "section": "", "pruner": {"name": "fastv"},
                   "budget": {"ratio": 0.4}, "position_ids": "keep"}  # fmt: skip
            (planned,) = plan_rows([row], shape_of(model), 12, 10)
            evaluator = Evaluator(model, processor, data, config, tmp_path / str(size), Console(file=StringIO()))
            record = evaluator.evaluate(replace(planned, key="key"), "title")
            found[size] = evaluator.read("key")
    assert record.metrics["seedbench/seed_all"]["n"] == ROWS
    assert [(o["prediction"], o["left"]) for o in found[3]] == [(o["prediction"], o["left"]) for o in found[1]]
    one, two = (len(found[1][place]["left"]) for place in (0, 7))
    # LLaVA-OneVision shows an image among several whole, without crops: 25 tokens each.
    assert two == (20 if kind == "llava_onevision" else 2 * one) and one
