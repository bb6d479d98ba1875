"""What a result's key depends on: somebody's own pruner, the commit of the model, the text encoder of rows that read it."""

from __future__ import annotations

import importlib
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import llava, plan_of
from omegaconf import OmegaConf
from test_encoders import clip_folder

import ivtp
from ivtp.backbones.loading.encoders import load_encoder
from ivtp.backbones.loading.hub import EMBEDDED, Checkpoint
from ivtp.experiment import planning as build
from ivtp.pruners import PRUNERS


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Somebody's pruner in a package or a single file: which it is, its file, and a file beside it."""

    def write(package: bool):
        folder, name = (tmp_path / "theirs", "theirs.method") if package else (tmp_path, "theirs_alone")
        folder.mkdir(exist_ok=True)
        if package:
            (folder / "__init__.py").write_text("")
        helper = "from theirs import beside" if package else "import beside_theirs as beside"
        file, beside = folder / f"{name.split('.')[-1]}.py", folder / ("beside.py" if package else "beside_theirs.py")
        beside.write_text("SHARE = 0.5\n")
        file.write_text(f"{helper}\n\ndef theirs_unusual(shape, keep):\n    return beside.SHARE\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(PRUNERS, "_functions", dict(PRUNERS._functions))
        PRUNERS.register(importlib.import_module(name).theirs_unusual)
        return file, beside

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in ("theirs", "theirs_alone", "beside_theirs")]:
        del sys.modules[name]


@pytest.mark.parametrize("package", [True, False])
def test_an_edit_of_ones_own_pruner_makes_new_results(own, package):
    """In its file or in one beside it; and back to the old source, to the old results."""
    for changed in own(package):
        before, text = build.pruner_source("theirs_unusual"), changed.read_text()
        assert before == build.pruner_source("theirs_unusual")
        changed.write_text(text + "\nSHARE = 0.25\n")
        assert build.pruner_source("theirs_unusual") != before
        changed.write_text(text)
        assert build.pruner_source("theirs_unusual") == before


def test_our_own_pruners_are_covered_by_the_hash_of_the_package():
    assert build.pruner_source("ivtp") is None


PROCESSOR = SimpleNamespace(image_processor=None)
READ = ["config.json", "chat_template.jinja", "tokenizer.model", "merges.txt", "modeling_own.py", "model.safetensors"]
READ += ["model-00001-of-00002.safetensors", "clip/vocab.txt", "additional_chat_templates/tool.jinja"]
"""Files of a checkpoint that loading may read."""


def identity_of(model, source: str) -> dict:
    return build.model_identity(
        OmegaConf.create({"model": {"source": source}, "trainer": {"precision": None}}), model, PROCESSOR
    )


def test_a_commit_that_moves_is_another_model(monkeypatch, tmp_path):
    found = []
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(llava(), "_checkpoint", Checkpoint("x/y", tmp_path, commit), raising=False)
        found.append(identity_of(llava(), "x/y")["hash"])
    assert found == ["a" * 40, "b" * 40]


@pytest.mark.parametrize("spelled", ["~/model", "{}/model", "model"])
def test_a_folder_is_hashed_however_it_is_spelled(spelled, tmp_path, monkeypatch):
    """Without a hash, an edited checkpoint would keep its old results."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED["tiny"], tmp_path / "model")
    model, _ = ivtp.load_model(source := spelled.format(tmp_path), image_padding="crop")
    assert identity_of(model, source)["hash"] == identity_of(ivtp.load_model("tiny")[0], "tiny")["hash"] is not None
    before = identity_of(model, source)["hash"]
    (tmp_path / "model" / "config.json").write_text("{}")
    assert identity_of(model, source)["hash"] != before


def test_encoders_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    clip_folder(tmp_path)
    hashes = [identity_of(load_encoder("transformers", source).model, source)["hash"] for source in ("~/", "tiny_clip")]
    assert None not in hashes and hashes[0] != hashes[1]


@pytest.mark.parametrize("name", READ)
def test_an_edit_of_any_file_that_loading_reads_makes_new_results(name, tmp_path):
    """A chat template decides what the model reads as much as its weights do."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("{ }")
    checkpoint = Checkpoint("x", tmp_path)
    before = build.checkpoint_hash(checkpoint)
    (tmp_path / name).write_text("{1}")
    assert build.checkpoint_hash(checkpoint) != before
    (tmp_path / name).write_text("{ }")
    (tmp_path / "README.md").write_text("a note")
    assert build.checkpoint_hash(checkpoint) == before


def test_the_folder_of_a_text_encoder_is_hashed_in_the_same_way(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "text_checkpoint", lambda model: Checkpoint("x", tmp_path))
    found = []
    for merges in ("a b", "b a"):
        (tmp_path / "merges.txt").write_text(merges)
        found.append(build.text_identity(llava(), [SimpleNamespace(plan=plan_of("ivtp", llava()))])["hash"])
    assert found[0] != found[1]


def test_only_rows_that_read_the_text_encoder_depend_on_it(monkeypatch, tmp_path):
    reads, other = (SimpleNamespace(plan=plan_of(name, llava())) for name in ("ivtp", "random"))
    assert reads.plan.reads_text and not other.plan.reads_text
    asked = []
    monkeypatch.setattr(
        build, "text_checkpoint", lambda model: asked.append(model) or Checkpoint("x/y", tmp_path, "c" * 40)
    )
    assert build.text_identity(llava(), [other]) is None and not asked  # nor is it fetched
    assert build.text_identity(llava(), [other, reads]) == {"source": "x/y", "hash": "c" * 40}
