"""What the README shows is what happens: every command and every piece of Python in it runs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import benchmarks
import pytest
from running import FIRST_RUN, README, ROOT, lines, run

import ivtp
from ivtp import bench, cost
from ivtp.models import ASSETS

FENCES = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, text in FENCES
    if language in ("bash", "sh", "shell", "console", "")
    for line in text.splitlines()
    if line.strip().startswith("python -m ivtp") and line not in FIRST_RUN
]
SNIPPETS = [text for language, text in FENCES if language == "python"]


def test_there_is_something_to_try():
    assert len(COMMANDS) >= 8
    assert len(SNIPPETS) >= 2
    assert len(README.splitlines()) < 250


def a_folder_of_questions(tmp_path: Path) -> Path:
    import json

    from PIL import Image

    folder = tmp_path / "questions"
    folder.mkdir()
    Image.new("RGB", (96, 96), (90, 90, 90)).save(folder / "a.png")
    row = {"id": "1", "image": "a.png", "question": "is there a red circle ?", "answer": "no"}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def a_llava(tmp_path: Path) -> Path:
    """Stands in for LLaVA-1.5's weights, which nobody has here: the embedded model with LLaVA's prompt."""
    return ASSETS / "tiny"


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory):
    """As a reader would, all commands in one folder: what an earlier one has evaluated is there already."""
    return tmp_path_factory.mktemp("reader")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, one_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(one_folder)
    program, _, module, *arguments = shlex.split(command)
    assert program == "python"
    stand_ins = {
        "data.path=my_pope": lambda: f"data.path={benchmarks.folder('pope')}",
        "data.path=": lambda: f"data.path={a_folder_of_questions(tmp_path)}",
        "model.source=": lambda: f"model.source={a_llava(tmp_path)}",
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
        pytest.fail("name it in this test, with the folder that it reads")
    assert module == "ivtp.run"
    if "--help" in arguments:
        assert run(*arguments, quick=False) == 0
        return
    limit = [] if any(a.startswith("data.limit=") for a in arguments) else ["data.limit=2"]
    assert run(*arguments, "debug=limit", *limit, "logger=none", quick=False) == 0
    output = next((a.partition("=")[2] for a in arguments if a.startswith("output=")), "outputs")
    assert all(lines(results) for results in (one_folder / output).glob("*/results.jsonl"))
    assert list((one_folder / output).glob("*/table.md"))


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_every_piece_of_python_runs(number, monkeypatch):
    import numpy as np
    from PIL import Image

    from ivtp.pruners import PRUNERS

    before = dict(PRUNERS._found)
    image = Image.fromarray(np.full((96, 96, 3), 90, np.uint8))
    names = {"image": image, "prompt": "<image> is there a red circle ?"}
    # In a real file, so that functions defined in it have annotations and a source.
    module = type(sys)("readme_snippet")
    module.__dict__.update(names)
    monkeypatch.setitem(sys.modules, "readme_snippet", module)
    try:
        exec(compile(SNIPPETS[number], f"README.md, Python {number + 1}", "exec"), module.__dict__)
        for name in set(PRUNERS._found) - set(before):
            model, processor = ivtp.load_model("tiny")
            with ivtp.prune(model, name, keep=9) as run_:
                model.generate(**processor(images=image, text=names["prompt"], return_tensors="pt"), max_new_tokens=1)
            assert run_.trace.kept.position.shape[1] == 9
    finally:
        for name in set(PRUNERS._found) - set(before):
            del PRUNERS._found[name]


def test_the_list_of_pruners_is_that_of_the_registry():
    from ivtp.pruners import PRUNERS

    section = README.split("## Pruners")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)`", section, re.MULTILINE)
    assert listed == sorted(set(listed), key=listed.index), "a pruner is listed twice"
    ours = {name for name in ivtp.list_pruners() if PRUNERS[name].__module__.startswith("ivtp.")}
    assert set(listed) == ours


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_tree_is_that_of_the_repository():
    tree = next(text for language, text in FENCES if language == "text" and "ivtp/" in text)
    folder = Path()
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            assert (ROOT / folder / name).exists(), f"{folder / name}"
        else:
            assert (ROOT / name).exists(), name
            folder = Path(name)
