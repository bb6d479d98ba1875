"""What cannot be done is said in one line on standard error: value, bound and fix; exit status 2; nothing lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.running import lines, one_line, outcomes, run, spawn
from PIL import Image

from ivtp.backbones.loading.hub import ASSETS

TINY = ASSETS / "tiny"


@pytest.fixture
def refused(tmp_path, capfd):
    """Run in this process what cannot be done; the line it says on standard error."""

    def go(*arguments: str, output: Path | None = None) -> str:
        capfd.readouterr()
        status = run(*arguments, output=output or tmp_path / "out")
        said = one_line(capfd.readouterr().err)
        assert status == 2
        return said

    return go


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("pruner=ivpt", ["'ivpt'", "Did you mean 'ivtp'?", "layerwise"]),
        ("model=tini", ["'tini'", "Did you mean 'tiny'?"]),
        ("experiment=ablation_groupsizes", ["'ablation_groupsizes'", "Did you mean 'ablation_groupsize'?"]),
        ("pruner.tua=0.3", ["'pruner.tua'", "Did you mean 'pruner.tau'?"]),
        ("budget.keep=325", ["keep=325", "324 visual tokens", "between 1 and 324"]),
        ("budget.keep=0", ["keep=0", "between 1 and 324"]),
        ("budget.keep=-16", ["keep=-16", "between 1 and 324"]),
        ("budget.keep=16.5", ["keep=16.5", "whole number", "between 1 and 324"]),
        ("budget.keep=many", ["keep='many'", "is not a number"]),
        ("budget.ratio=0", ["budget.ratio=0", "above 0 and at most 1"]),
        ("budget.ratio=1.5", ["budget.ratio=1.5", "above 0 and at most 1"]),
        ("budget.tflops=50", ["budget.tflops=50", "between"]),
        ("budget.tflops=nan", ["budget.tflops=nan"]),
        ("budget.like=nobody", ["'nobody'", "unpruned"]),
        ("pruner.group=13", ["group=13", "larger than the stack", "12 layers"]),
        ("pruner.language_group=7", ["group=7", "larger than the stack", "6 layers"]),
        ("pruner.group=0", ["group=0", "positive number of layers"]),
        ("pruner.group=some", ["group='some'", "or 'all'"]),
        ("pruner.tau=high", ["tau='high'", "is not a number", "0.2"]),
        ("pruner.tau=nan", ["tau=nan", "is not a number", "0.2"]),
        ("pruner.tau=null", ["tau=None", "is not a number", "0.2"]),
        ("pruner.tau=[0.2]", ["tau=[0.2]", "is not a number"]),
        ("pruner.tau=true", ["tau=True", "is not a number"]),
        ("pruner.combine=sum", ["combine='sum'", "residual, mean, max, multiply"]),
        ("pruner.value_norm=3", ["value_norm=3", "true or false"]),
        ("pruner.part1=17", ["part1=17", "between 1 and 16"]),
        ("pruner.part1=x", ["part1='x'", "whole number"]),
        ("pruner.vision_keep=3", ["vision_keep=3", "between keep=36 and 324"]),
        ("compare_to=nobody", ["'nobody'", "unpruned"]),
        ("data.split=exam", ["'exam'", "train, validation, test"]),
        ("data.limit=-5", ["data.limit=-5", "at least 1"]),
        ("data.scenes=100000000000000000000", ["scenes", "between 1 and 1000000"]),
        ("model.prompt='what is it ?'", ["'what is it ?'", "{question} once", "<image> once"]),
        ("model.prompt='<image> <image> {question}'", ["<image> <image>", "<image> once"]),
        ("model.prompt='<image>'", ["{question} once"]),
        ("model.source=/nowhere/at/all", ["/nowhere/at/all", "does not exist", "*.safetensors"]),
        ("data=folder", ["data.path", "data.path=VALUE"]),
        ("model.text_encoder=5", ["model.text_encoder=5", "null or a text", "model.text_encoder='12'"]),
        ("model.text_encoder=true", ["model.text_encoder=True", "null or a text"]),
        ("model.text_encoder=[a]", ["model.text_encoder=['a']", "null or a text"]),
        ("model.text_encoder=", ["model.text_encoder=''", "not empty"]),
        ("model.attn_implementation=5", ["model.attn_implementation=5", "null or a text"]),
        ("model.revision=1234567", ["model.revision=1234567", "null or a text"]),
        ("model.trust_remote_code=no", ["model.trust_remote_code=no", "false, true"]),
        ("model.load_in_4bit=[]", ["model.load_in_4bit=[]", "false, true"]),
        ("trainer.device=tpu", ["trainer.device=tpu", "auto, cpu, cuda"]),
    ],
)
def test_a_value_that_cannot_be_used(refused, argument, said):
    line = refused(argument)
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.pack=true", "model.dtype=bfloat16"], ["pack=true", "bfloat16 on cpu", "leave pack out"]),
        (
            ["trainer.pack=true", "model=tiny_clip", "data=emoji", "pruner=rollout"],
            ["trainer.pack", "before a language model"],
        ),
        (
            ["trainer.vision_batch=2", "model=tiny_clip", "data=emoji", "pruner=rollout"],
            ["trainer.vision_batch", "leave them out"],
        ),
    ],
)
def test_what_makes_other_models_faster(refused, arguments, said):
    line = refused(*arguments)
    for part in said:
        assert part in line


def test_in_a_process_of_its_own_too_and_without_a_traceback(tmp_path):
    done = spawn("pruner.tau=high", "debug=limit", "logger=none", f"output={tmp_path}")
    assert done.returncode == 2
    assert "tau='high' is not a number" in one_line(done.stderr)


# Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


@pytest.mark.parametrize("size", [0, 7, 1000, -1000])
def test_truncated_weights(refused, checkpoint, size):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    line = refused(f"model.source={checkpoint}")
    assert f"cannot load model '{checkpoint}'" in line


def test_a_truncated_text_encoder_is_named_too(refused, checkpoint):
    weights = checkpoint / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"cannot load model '{checkpoint / 'clip'}'" in refused(f"model.source={checkpoint}")


class Bomb:
    """A pickle that leaves a file behind if anybody opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_never_opened(refused, checkpoint, tmp_path, name):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    line = refused(f"model.source={checkpoint}")
    assert not (tmp_path / "opened").exists()
    assert f"{name}, a pickle, which is never opened here" in line
    assert "convert it to safetensors" in line
    pickle.loads((checkpoint / name).read_bytes())
    assert (tmp_path / "opened").exists(), "the bomb of this test is a dud"


def test_nor_is_the_pickle_of_a_text_encoder(refused, checkpoint, tmp_path):
    (checkpoint / "clip" / "model.safetensors").unlink()
    (checkpoint / "clip" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    assert "clip" in refused(f"model.source={checkpoint}")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "has a config.json that cannot be read"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "supported: internvl, llava, "),
        (lambda f: (f / "model.safetensors").unlink(), "has no *.safetensors weights"),
        (lambda f: shutil.copy(f / "clip" / "model.safetensors", f / "model.safetensors"), "lacks weights"),
    ],
    ids=["no folder", "no config", "broken config", "another family", "no weights", "weights of another model"],
)
def test_a_folder_that_is_no_checkpoint(refused, checkpoint, spoil, said):
    spoil(checkpoint)
    line = refused(f"model.source={checkpoint}")
    assert said in line
    assert str(checkpoint) in line


# Data -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (96, 96), (10, 200, 10)).save(folder / "a.png")
    row = {"image": "a.png", "question": "is there a red circle ?", "answer": "no"}

    def write(**last) -> Path:
        rows = [{"id": "first", **row}, {"id": "second", **row, **last}]
        (folder / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return folder

    return write


@pytest.fixture
def failed(tmp_path, capfd):
    """Run over two questions of which one cannot be used, and the other is answered: the outcome of the first."""

    def go(folder: Path) -> dict:
        one = "variants=[{label: a, pruner: none}]"
        assert run(one, "data=folder", f"data.path={folder}", "data.max_new_tokens=1", output=tmp_path / "out") == 0
        said = capfd.readouterr()
        assert "1 of 2 samples failed" in said.out and said.err == ""
        record = lines(tmp_path / "out" / "run" / "results.jsonl")[-1]
        assert record["metrics"]["accuracy"]["n"] == 1 and record["failed"]["n"] == 1
        first, second = outcomes(tmp_path / "out" / "run", record)
        assert "failed" not in first and second["id"] == "second" and second["correct"] is None
        return second

    return go


def test_an_image_that_cannot_be_read_fails_alone(failed, questions):
    folder = questions(image="b.png")
    assert "image 'b.png' cannot be read" in failed(folder)["failed"]
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    assert "image 'b.png' cannot be read" in failed(folder)["failed"]


def test_images_of_which_none_can_be_read_end_in_one_line(refused, questions):
    folder = questions()
    (folder / "a.png").unlink()
    line = refused("data=folder", f"data.path={folder}")
    assert "none of the 2 samples can be" in line and "image 'a.png' cannot be read" in line


def test_an_empty_question_names_its_sample(refused, questions):
    line = refused("data=folder", f"data.path={questions(question='  ')}")
    assert "sample 'second' has an empty question" in line


def test_a_question_with_an_image_of_its_own_fails_alone(failed, questions):
    outcome = failed(questions(question="what is <image> ?"))
    assert outcome["cause"] == "cannot be prepared" and "image token '<image>'" in outcome["failed"]


def test_good_questions_of_your_own_are_answered(tmp_path, questions):
    assert run("data=folder", f"data.path={questions()}", "data.max_new_tokens=2", output=tmp_path / "out") == 0
    for record in lines(tmp_path / "out" / "run" / "results.jsonl"):
        assert record["metrics"]["accuracy"]["n"] == 2
        assert record["metrics"]["images"] == 1


# Where results go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_a_file_in_the_way_of_the_output(refused, tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    line = refused(output=tmp_path / "file" / inside)
    assert str(tmp_path / "file") in line
    assert "output=FOLDER" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_the_system_does_not_let_be_written(refused):
    assert "output=FOLDER" in refused(output=Path("/proc/ivtp"))


def test_finished_results_outlive_a_request_that_cannot_be_met(refused, tmp_path):
    """A text encoder that is not there is said before the first row, and results that there are stay as they are."""
    rows = "variants=[{label: unpruned, pruner: none}, {label: ours}]"
    assert "/no/clip" in refused(rows, "model.text_encoder=/no/clip").replace("'", "")
    assert not (tmp_path / "out" / "run" / "results.jsonl").exists()
    assert run("variants=[{label: unpruned, pruner: none}]", output=tmp_path / "out") == 0
    before = (tmp_path / "out" / "run" / "results.jsonl").read_bytes()
    assert "/no/clip" in refused(rows, "model.text_encoder=/no/clip").replace("'", "")
    refused(rows, "pruner.tau=high", "model.text_encoder=/no/clip")
    assert (tmp_path / "out" / "run" / "results.jsonl").read_bytes() == before


ROWS = "variants=[{label: unpruned, pruner: none}, {label: a, pruner: random}, {label: b, pruner: topk}]"


def whole_lines(folder: Path) -> list[bytes]:
    """Lines of the results, every one of which can be read."""
    path = folder / "run" / "results.jsonl"
    found = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    assert all(json.loads(line) and line.endswith(b"\n") for line in found)
    return found


def test_no_room_for_a_file_to_grow(tmp_path):
    """The system refuses to let any file grow beyond a size, as a quota does; later it lets."""

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    arguments = [ROWS, "debug=limit", "logger=none", f"output={tmp_path}"]
    done = spawn(*arguments, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    line = one_line(done.stderr)
    assert "cannot write" in line
    assert os.strerror(errno.EFBIG) in line or "bytes fit" in line
    assert "make room or choose another folder with output=FOLDER" in line
    before = whole_lines(tmp_path)
    assert run(ROWS, output=tmp_path) == 0
    after = whole_lines(tmp_path)
    assert after[: len(before)] == before
    assert len(after) == 3


def test_a_disk_that_is_full(tmp_path):
    """A file system of 60 KiB; when it has grown the same command goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", disk]
    if subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here (needs root); the test of RLIMIT_FSIZE stands for it")
    try:
        done = spawn(ROWS, "debug=limit", "logger=none", f"output={disk}")
        assert done.returncode == 2, done.stderr
        line = one_line(done.stderr)
        assert os.strerror(errno.ENOSPC) in line or "bytes fit" in line
        assert "make room or choose another folder with output=FOLDER" in line
        before = whole_lines(disk)
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        assert run(ROWS, output=disk) == 0
        after = whole_lines(disk)
        assert after[: len(before)] == before
        assert len(after) == 3
    finally:
        subprocess.run(["umount", disk], check=True)
