"""The README and the pages of the documentation show what happens: every command and every piece of Python in them runs."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from pkgutil import resolve_name

import pytest
from helpers import benchmarks
from helpers.running import COPIED, FIRST_RUN, PAGES, README, ROOT, lines, run

import ivtp
from ivtp import bench, cost
from ivtp.backbones.loading.hub import ASSETS
from ivtp.experiment import plugins
from ivtp.pruners import PRUNERS
from ivtp.report import __main__ as report

FENCES = [
    (page, language, text)
    for page, whole in PAGES.items()
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", whole, re.MULTILINE | re.DOTALL)
]
LINES = [
    (line, line.split("  #")[0].strip())
    for _, language, text in FENCES
    if language in ("bash", "sh", "shell", "console", "")
    for line in text.splitlines()
]
COMMANDS = list(
    dict.fromkeys(command for line, command in LINES if command.startswith("python -m ivtp") and line not in FIRST_RUN)
)
# Commands for several machines: composed, not run.
ELSEWHERE = [command for _, command in LINES if re.match(r"(srun|torchrun) .*-m ivtp\.run ", command)]
SNIPPETS = [(page, text) for page, language, text in FENCES if language == "python"]


def fence(page: str, language: str) -> str:
    """The only block of a language on a page."""
    (text,) = [text for at, of, text in FENCES if (at, of) == (page, language)]
    return text


def test_there_is_something_to_try():
    assert len(COMMANDS) >= 8
    assert len(ELSEWHERE) >= 2
    assert {page for page, _ in SNIPPETS} >= {"README.md", "docs/quickstart.md", "docs/how-to/own_pruner.md"}
    assert len(README.splitlines()) <= 110


def a_folder_of_questions(tmp_path: Path) -> Path:
    import json

    from PIL import Image

    folder = tmp_path / "questions"
    folder.mkdir()
    Image.new("RGB", (96, 96), (90, 90, 90)).save(folder / "a.png")
    row = {"id": "1", "image": "a.png", "question": "is there a red circle ?", "answer": "no"}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    return folder


A_LLAVA = ASSETS / "tiny"
"""Stands in for LLaVA-1.5's weights, which nobody has here: the embedded model with LLaVA's prompt."""


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory):
    """As a reader would, all commands in one folder: what an earlier one has evaluated is there already."""
    return tmp_path_factory.mktemp("reader")


@pytest.fixture
def without_plugins(monkeypatch):
    """What plugins register stays in this test."""
    monkeypatch.setattr(PRUNERS, "_functions", dict(PRUNERS._functions))
    monkeypatch.setattr(plugins, "_LOADED", set())
    yield
    sys.modules.pop("my_pruner", None)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, one_folder, tmp_path, monkeypatch, capsys, without_plugins):
    monkeypatch.chdir(one_folder)
    program, _, module, *arguments = shlex.split(command)
    assert program == "python"
    stand_ins = {
        "data.path=my_pope": lambda: f"data.path={benchmarks.folder('pope')}",
        "data.path=": lambda: f"data.path={a_folder_of_questions(tmp_path)}",
        "model.source=": lambda: f"model.source={A_LLAVA}",
    }
    if "data.path=my_pope" in arguments:  # in words that the embedded model knows
        arguments += ["data.prompt={pre_prompt: '', post_prompt: ''}"]
    arguments = [next((new() for start, new in stand_ins.items() if a.startswith(start)), a) for a in arguments]
    if any(a.startswith("model.source=") for a in arguments):
        arguments += ["model.text_encoder=null"]
    if module == "ivtp.cost":
        assert cost.main(arguments) == 0
        assert capsys.readouterr().out.strip()
        return
    if module == "ivtp.bench":
        arguments = [a for a in arguments if not a.startswith("suite=")]
        assert bench.main([*arguments, "suite=tiny", "rounds=1"]) == 0
        assert capsys.readouterr().out.strip()
        return
    if module == "ivtp.report":
        for name, pruner in (("first", "topk"), ("second", "ivtp")):
            assert run(f"pruner={pruner}", f"name={name}", "data.limit=2", output=Path("outputs")) == 0
        assert report.main(arguments) == 0
        return
    assert module == "ivtp.run"
    if {"--help", "--cfg", "dry_run=true"} & set(arguments):
        assert run(*arguments, quick=False) == 0
        return
    if "--config-dir" in arguments:
        Path("mine/experiment").mkdir(parents=True, exist_ok=True)
        Path("mine/experiment/first.yaml").write_text(fence("docs/how-to/own_experiment.md", "yaml"))
    if "plugins=[my_pruner.py]" in arguments:
        Path("my_pruner.py").write_text(SNIPPETS[[page for page, _ in SNIPPETS].index("docs/how-to/own_pruner.md")][1])
    arguments += ["hydra.sweeper.n_trials=2"] * any(a.startswith("hydra/sweeper=") for a in arguments)
    limit = [] if any(a.startswith("data.limit=") for a in arguments) else ["data.limit=2"]
    assert run(*arguments, "debug=limit", *limit, "logger=none", quick=False) == 0
    output = next((a.partition("=")[2] for a in arguments if a.startswith("output=")), "outputs")
    assert all(lines(results) for results in (one_folder / output).glob("*/results.jsonl"))
    assert list((one_folder / output).glob("*/table.md"))


@pytest.mark.parametrize("command", ELSEWHERE)
def test_commands_for_several_machines_compose(command):
    from ivtp.experiment.config import load_config
    from ivtp.experiment.variants import variants

    arguments = shlex.split(command.partition("-m ivtp.run ")[2].replace("$pruner", "ivtp"))
    assert next(row["label"] for row in variants(load_config(arguments))) == "unpruned"


@pytest.fixture(scope="module")
def tiny():
    return ivtp.load_model("tiny")


@pytest.mark.parametrize("number", range(len(SNIPPETS)), ids=[page for page, _ in SNIPPETS])
def test_every_piece_of_python_runs(number, tiny, monkeypatch):
    import numpy as np
    from PIL import Image

    before = dict(PRUNERS._functions)
    image = Image.fromarray(np.full((96, 96, 3), 90, np.uint8))
    model, processor = tiny
    names = {"image": image, "prompt": "<image> is there a red circle ?", "model": model, "processor": processor}
    page, text = SNIPPETS[number]
    # In a real file, so that functions defined in it have annotations and a source.
    module = type(sys)("documentation_snippet")
    module.__dict__.update(names)
    monkeypatch.setitem(sys.modules, "documentation_snippet", module)
    try:
        exec(compile(text, f"{page}, Python", "exec"), module.__dict__)
        for name in set(PRUNERS._functions) - set(before):
            with ivtp.prune(model, name, keep=9) as run_:
                model.generate(**processor(images=image, text=names["prompt"], return_tensors="pt"), max_new_tokens=1)
            assert run_.trace.kept.position.shape[1] == 9
    finally:
        for name in set(PRUNERS._functions) - set(before):
            del PRUNERS._functions[name]


def test_the_experiment_of_the_how_to_composes(tmp_path, monkeypatch):
    from ivtp.experiment import config
    from ivtp.experiment.variants import variants

    configs = shutil.copytree(config.FOLDER, tmp_path / "configs")
    text = fence("docs/how-to/own_experiment.md", "yaml")
    (configs / "experiment" / "my_experiment.yaml").write_text(text)
    monkeypatch.setattr(config, "FOLDER", configs)
    rows = list(variants(config.load_config(["experiment=my_experiment"])))
    assert [row["label"] for row in rows] == ["unpruned", "ivtp 1/9", "ivtp 2/9", "random 1/9", "random 2/9"]
    assert config.options("experiment")["my_experiment"].endswith("?")


def test_the_entry_point_of_the_how_to_is_that_of_the_registry():
    (group,) = tomllib.loads(fence("docs/how-to/own_pruner.md", "toml"))["project"]["entry-points"]
    assert group == PRUNERS.group


def test_the_number_of_methods_is_about_that_of_the_registry():
    """Rounded to tens, so that a new pruner is one file and no edit of the README."""
    from ivtp.pruners import shipped_pruners

    tens = round(len(set(shipped_pruners()) - {"none"}), -1)
    assert re.findall(r"\b[Aa]bout (\d+)(?: methods\b|, from IVTP)", README) == [str(tens)] * 2


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(page):
    text = PAGES[page] if page in PAGES else (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            place = ((ROOT / page).parent / target).resolve().relative_to(ROOT)
            if place.parts[0] == "docs" and place.parts[1] in COPIED:  # where the build copies it from
                place = place.relative_to("docs")
            assert (ROOT / place).exists(), target


def test_symbols_that_pages_name_exist():
    """Code spans such as `ivtp.core.scores.Rollout`, and roles and directives that refer to Python objects."""
    text = "\n".join(text for page, text in PAGES.items())
    names = set(re.findall(r"`(ivtp(?:\.\w+)+)`", text)) | set(re.findall(r"<(ivtp(?:\.\w+)+)>`", text))
    names |= set(re.findall(r"^\.\. auto\w+:: (\S+)", text, re.MULTILINE))
    assert len(names) > 30
    for name in names:
        resolve_name(name)


def test_every_public_name_is_on_the_page_of_the_api():
    listed = re.findall(r"auto\w+:: ivtp\.(\w+)$", PAGES["docs/reference/api.md"], re.MULTILINE)
    assert set(listed) == set(ivtp.__all__)


def test_the_tree_is_that_of_the_repository():
    above = []
    for line in fence("docs/reference/layout.md", "text").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.findall(r"(?:^ *|  )([\w.]+/)", line) or line.split()[:1]:
            above[depth:] = [name]
            assert ROOT.joinpath(*above).exists(), above
