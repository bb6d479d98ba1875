"""The recipe for scenes2: sources agree with the assets, labels with the questions, fast passes with transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import experiments
from ivtp.data.scenes2 import assets, make_scene

# This folder and the recipes' bear the same name.
experiments.__path__.append(str(Path(__file__).resolve().parents[2] / "experiments"))

from experiments.scenes2 import cache, check, models, stage_a, stage_b  # noqa: E402
from experiments.scenes2.assets import concepts  # noqa: E402


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cache.make_shard(cache.root(folder, "validation", 0, 144), "validation", 0, 0, 144, scenes=24)
    (path,) = cache.ready(folder, "validation", 0, 144)
    return cache.Shard(path)


def test_assets_are_made_from_the_committed_lists():
    rows = json.loads((assets.FOLDER / "index.json").read_text(encoding="utf-8"))["concepts"]
    listed = [(c.name, c.synonyms, c.hypernyms, c.themes) for c in concepts.read()]
    assert [(r["name"], r["synonyms"], r["hypernyms"], r["themes"]) for r in rows] == listed


def test_cache_holds_what_the_scene_shows(shard):
    scene, questions = make_scene("validation", 5)
    assert np.array_equal(shard.images[5], scene.image)
    shown = shard.patches(np.array([5]))[0]
    for i, thing in enumerate(scene.things):
        assert cache.NAMES[shard.things[5, i, 0]] == thing.concept and np.array_equal(shown[i], thing.patches)
    for (family, text, answer, terms, targets, *_), question in zip(shard.questions[5], questions, strict=True):
        assert (family, text, answer, tuple(terms)) == (question.family, question.text, question.answer, question.terms)
        assert np.array_equal(shown[targets].any(0), scene.patches(question.targets, 18))


def test_truth_of_words_agrees_with_the_answers(shard):
    truth = stage_a.Truth()(shard.things, shard.signs, shard.places)
    for i, questions in enumerate(shard.questions):
        for family, _, answer, terms, *_ in questions:
            if family == "exist":
                value = truth[i, stage_a.TERMS.index(terms[0])]
                assert value > 0 if answer == "yes" else value == -1


def test_captions_are_true_of_their_own_picture_only_by_facts(shard):
    rng = np.random.default_rng(0)
    scenes = list(zip(shard.things, shard.signs, shard.places, strict=True))
    for scene in scenes:
        said = stage_a.mentions(*scene, rng)
        assert {fact for facts, _ in said for fact in facts} <= stage_a.facts(*scene)
        assert 1 <= len(said) <= 5 and stage_a.caption(said)
    _, tokenizer = models.tokenizers()
    batch = stage_a.Batches([shard], tokenizer, 8, (0,))()
    assert batch["match"].diagonal().all()
    assert (batch["of"] >= 0).any() and (batch["of"] == -1).any()
    assert (batch["of"][:8] == -2).all()  # captions are read as a whole


def test_targets_are_the_answers_pieces_and_the_end(shard):
    tokenizer, _ = models.tokenizers()
    ids, valid, targets = stage_b.Encoder(tokenizer)(shard.questions[:3])
    for i in range(3):
        for j, question in enumerate(shard.questions[i]):
            wanted = targets[i, j][targets[i, j] >= 0].tolist()
            assert wanted[-1] == tokenizer.eos_token_id and tokenizer.decode(wanted[:-1]).strip() == question[2]
            text = ids[i, j][valid[i, j]].tolist()
            assert tokenizer.decode(text).strip() == f"{question[1]} {question[2]}"
            assert text[len(text) - len(wanted) + 1 :] == wanted[:-1]


def test_oracle_keeps_the_target_first():
    wanted = np.zeros((2, 324), bool)
    wanted[0, 100:110] = wanted[1, :60] = True
    kept = stage_b.tokens_kept(36, wanted, np.random.default_rng(0), 324, 2)
    assert set(range(100, 110)) <= set(kept[0].tolist())
    assert set(kept[1].tolist()) <= set(range(60))
    assert kept.shape == (2, 36) and (np.diff(kept, axis=1) > 0).all()


def test_fast_passes_equal_transformers(monkeypatch):
    monkeypatch.setattr(models, "LOW", torch.float32)
    torch.manual_seed(0)
    assert check.vision(324) < 1e-4
    assert check.language(324) < 1e-4
