"""Text of data is text wherever it goes: terminal, table.md, page, JSON lines, pictures, W&B."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import unicodedata
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.running import environment, lines, outcomes, run, spawn
from PIL import Image
from rich.console import Console
from rich.table import Table

from ivtp import results as records
from ivtp.cli.command import command
from ivtp.evaluation.progress import RowProgress
from ivtp.registry import UserError
from ivtp.report.console import PlainConsole
from ivtp.report.plots import plain, plt, save
from ivtp.report.tables import escape
from ivtp.text import one_line, printable, shortened

NASTY = (
    "\x1b[31mred\x1b[0m | a \x07 \x9b2J \x7f",
    "[/] [bold]x[/bold] [link=http://evil]y :smile:",
    "</script><script>window.pwned = 1</script>|`x` <!--",
    "a\nb\r\nc\u2028d\u202edcba\u2066 $x^2$ $\\frac{$",
    "![x](http://evil/a.png) <img src=x onerror=y> &lt; \\| \\",
)
WORSE = (*NASTY, "half \ud83d of a pair", "nul \0 nul", "\udfff")
"""What cannot even be written as UTF-8, or ends a string of C."""


def raw(text: str) -> list[str]:
    """Characters that a terminal or an editor would obey."""
    bad = {"\u2028", "\u2029", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
    return [
        c
        for c in text
        if c in bad or unicodedata.category(c) == "Cs" or (unicodedata.category(c) == "Cc" and c != "\n")
    ]


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its comments."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: Counter = Counter()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found[tag, tuple(sorted(name for name, _ in attrs))] += 1

    def handle_comment(self, data):
        self.found["comment", ()] += 1


def columns(line: str) -> int:
    """Cells of a line of a Markdown table."""
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) - 1


def tables(text: str) -> list[list[str]]:
    return [part.splitlines() for part in re.findall(r"(?:^\|.*\n)+", text, flags=re.M)]


def check_folder(folder: Path) -> None:
    """Nothing raw and nothing injected in what a run wrote."""
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert raw(text) == []
    assert tables(text)
    for table in tables(text):
        assert len({columns(line) for line in table}) == 1, table
    assert "<" not in text and "](" not in text and not re.search(r"(?<!\\)`", text)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert [c for c in page if (unicodedata.category(c) == "Cc" and c not in "\n\t") or "\ud800" <= c <= "\udfff"] == []
    assert "\\u2028" not in page.partition('id="data">')[2].partition("<")[0].replace("\\\\u2028", ""), (
        "Vega cannot read it"
    )
    found = Elements(page).found
    assert sum(n for (tag, _), n in found.items() if tag == "script") == 3
    tags = {tag for tag, _ in found}
    assert not tags & {"img", "b", "comment", "iframe", "object"}
    assert not [name for _, names in found for name in names if name.startswith("on")]
    for path in folder.rglob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            json.loads(line.decode("utf-8"))


@pytest.mark.parametrize("text", WORSE)
def test_a_line_is_one_line_and_says_what_was_there(text):
    shown = one_line(text)
    assert raw(shown) == [] and "\n" not in shown
    assert shown.encode().decode() == shown
    assert [c for c in printable(text) if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"] == []
    assert raw(escape(text)) == [] and columns(f"| {escape(text)} |") == 1


def test_what_is_harmless_stays_as_it_is():
    text = "ما لون الدائرة؟ 👩‍👩‍👧 – τ ≥ 0.2 é \u0301 日本 “x”"
    assert one_line(text) == printable(text) == text
    assert one_line("\x1b[1m\n\u202e\ud800") == "\\x1b[1m\\n\\u202e\\ud800"
    assert (shortened("abc", 3), shortened("abcd", 3)) == ("abc", "ab…")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("text", WORSE)
def test_the_terminal_gets_text(text, terminal):
    """As a line, in a cell, as a head, a title or a caption, and as the name of a progress bar."""
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=terminal, width=250)
    console.print(f"1/2 {text}: 3.0 %", soft_wrap=True)
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    console.print(table)
    bar = RowProgress(console, text, 2, 0)
    bar.on_test_start(None, None)
    bar.on_test_batch_end(None, None, {"outcomes": [{}]}, None, 0)
    bar.on_test_end(None, None)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", out.getvalue())  # what rich itself draws with
    assert raw(shown) == []
    assert shown.count(one_line(text)) >= 5
    usual = io.StringIO()
    Console(file=usual, width=250).print("a – b", Table("x"))
    mine = io.StringIO()
    PlainConsole(file=mine, width=250).print("a – b", Table("x"))
    assert usual.getvalue() == mine.getvalue()


@pytest.mark.parametrize("text", WORSE)
def test_an_error_is_one_line_of_text(text, capsys):
    def fails(_):
        raise UserError(f"no {text}")

    assert command([], str, fails) == 2
    said = capsys.readouterr().err
    assert said == f"ivtp: no {one_line(text)}\n" and raw(said) == []

    def gone(_):
        raise OSError(28, "No space left", text)

    assert command([], str, gone) == 2
    said = capsys.readouterr().err
    assert raw(said) == [] and said.count("\n") == 1


def test_json_lines_hold_what_utf8_cannot(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": text, text: [text]} for text in WORSE]
    records.append(path, rows)
    assert records.read(path) == (rows, 0)
    path.read_bytes().decode("utf-8")
    assert records.as_json({"é": "\ud800"}) == '{"é": "\\ud800"}'.encode()


@pytest.mark.parametrize("text", WORSE)
def test_a_picture_draws_text_without_a_word(text, tmp_path):
    figure, axes = plt.subplots()
    axes.set_title(plain(text))
    axes.set_xlabel(plain("日本 👩‍👩‍👧"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "a.png", 40)
    assert Image.open(tmp_path / "a.png").size[0] > 100


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A folder of questions with such a text in every field, in a process of its own, with W&B and a bad sample."""
    root = tmp_path_factory.mktemp("nasty")
    rng, rows = np.random.default_rng(0), []
    (root / "data").mkdir()
    for number, text in enumerate(NASTY):
        name = f"{number} " + re.sub("[\n\r/]", "", text) + ".png"
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / "data" / name)
        row = {"id": f"{number} {text}", "image": name, "question": f"what ? {text}", "answer": text, "family": text}
        rows.append(row)
    (root / "data" / rows[3]["image"]).write_bytes(b"no image")
    (root / "data" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["model=tiny", "pruner=topk", "data=folder", f"data.path={root / 'data'}", "data.max_new_tokens=1"]
    env = environment(HOME=str(root), XDG_CACHE_HOME=str(root), XDG_CONFIG_HOME=str(root))
    done = spawn(*arguments, "viewer=2", "logger.samples=2", f"output={root}", env=env)
    return root / "run", done


def test_a_run_over_such_data_ends_well_and_obeys_none_of_it(nasty):
    folder, done = nasty
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert raw(done.stdout) == []
    for text in NASTY[:3]:
        assert one_line(text) in done.stdout, "a family of questions, as the head of its column"
    assert "1 of 5 samples failed (1 cannot be read)" in done.stdout
    check_folder(folder)
    record = lines(folder / "results.jsonl")[-1]
    found = outcomes(folder, record)
    assert [o["family"] for o in found] == list(NASTY), "records hold what the data holds"
    assert [o["id"] for o in found if "failed" in o] == [f"3 {NASTY[3]}"]
    assert len(list((folder / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert {path.name for path in folder.iterdir()} >= {"accuracy_flops.png", "kept_tokens.png"}


def test_worse_texts_in_records_and_answers_do_nothing(nasty, tmp_path, capfd):
    """Of a model that answers anything, of labels and classes: the report is written from them alone."""
    from ivtp.cli.report import main

    folder = shutil.copytree(nasty[0], tmp_path / "copy")
    rows = lines(folder / "results.jsonl")
    for number, (row, label) in enumerate(zip(rows, WORSE[::-1], strict=False)):
        row |= {"label": f"{number} {label}", "section": WORSE[number], "experiment": WORSE[5], "series": label}
        path = folder / "outcomes" / f"{row['key']}.jsonl"
        found = 2 * [outcome for outcome in lines(path) if "failed" not in outcome]
        found = [dict(outcome) for outcome in found]
        for i, (outcome, text) in enumerate(zip(found, WORSE, strict=True)):
            outcome |= {"prediction": text, "early": text, "question": text, "answer": text, "id": f"{i} {text}"}
            outcome |= {"failed": text, "cause": "cannot be read", "where": text} if i in (5, 6) else {}
            outcome["words"] = [[text, 0.5]]
        path.write_bytes(records.lines(found))
        row["metrics"][f"accuracy/{WORSE[5]}"] = row["metrics"]["accuracy"]
        row["failed"] = {"n": 2, "causes": {"cannot be read": 2}}
        done = [outcome for outcome in found if "failed" not in outcome]
        row["metrics"]["accuracy"]["n"] = sum(outcome["correct"] is not None for outcome in done)
        row["metrics"]["images"] = len({outcome["image"] for outcome in done})
    (folder / "results.jsonl").write_bytes(records.lines(rows))
    about = {"keys": [row["key"] for row in rows], "question": WORSE[6], "compare_to": rows[1]["label"]}
    (folder / "experiment.json").write_bytes(records.as_json(about))
    capfd.readouterr()
    assert main([str(folder)]) == 0
    said = capfd.readouterr()
    assert said.err == "" and raw(said.out) == []
    check_folder(folder)
    assert one_line(WORSE[5]) in (folder / "table.md").read_text().replace("\\\\", "\\")
    json.loads((folder / "comparisons.json").read_bytes().decode())


def test_classes_called_so_are_classes(tmp_path, capfd):
    """Folders of images with such names, some not even UTF-8, for an encoder that reads the names."""
    names = [re.sub("/", "", text).encode() for text in NASTY] + [b"caf\xe9", b"circle"]
    rng = np.random.default_rng(1)
    for number, name in enumerate(names):
        folder = Path(str(tmp_path / "images"), name.decode("utf-8", "surrogateescape"))
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{number}\x1b.png")
    capfd.readouterr()
    arguments = ["model=tiny_clip", "data=imagefolder", f"data.path={tmp_path / 'images'}", "pruner=group_mean"]
    assert run(*arguments, output=tmp_path) == 0, capfd.readouterr().err
    said = capfd.readouterr()
    assert said.err == "" and raw(said.out) == []
    check_folder(tmp_path / "run")
    record = lines(tmp_path / "run" / "results.jsonl")[0]
    assert record["metrics"]["accuracy"]["n"] == 7 and "failed" not in record
    assert {o["answer"] for o in outcomes(tmp_path / "run", record)} >= {"circle", "caf\N{REPLACEMENT CHARACTER}"}


if sys.getfilesystemencoding() != "utf-8":
    pytest.skip("file names cannot hold these texts here", allow_module_level=True)
