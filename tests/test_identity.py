"""What a result's key depends on: somebody's own pruner, the commit of the model, the text encoder of rows that read it."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
from conftest import llava, plan_of
from omegaconf import OmegaConf

from ivtp import build
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
        monkeypatch.setattr(PRUNERS, "_found", dict(PRUNERS._found))
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


def test_a_commit_that_moves_is_another_model(monkeypatch):
    config = OmegaConf.create({"model": {"source": "llava-hf/llava-1.5-7b-hf"}})
    found = []
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(llava(), "_commit_hash", commit, raising=False)
        found.append(build.model_identity(config, llava(), SimpleNamespace(image_processor=None))["hash"])
    assert found == ["a" * 40, "b" * 40]


def test_only_rows_that_read_the_text_encoder_depend_on_it(monkeypatch, tmp_path):
    from ivtp.backbones.hub import Checkpoint

    reads, other = (SimpleNamespace(plan=plan_of(name, llava())) for name in ("ivtp", "random"))
    assert build.reads_text(reads) and not build.reads_text(other)
    asked = []
    monkeypatch.setattr(
        build, "text_checkpoint", lambda model: asked.append(model) or Checkpoint("x/y", tmp_path, "c" * 40)
    )
    assert build.text_identity(llava(), [other]) is None and not asked  # nor is it fetched
    assert build.text_identity(llava(), [other, reads]) == {"source": "x/y", "hash": "c" * 40}
