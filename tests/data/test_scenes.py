"""The scenes data set: determinism, disjoint digits, answers, patches, balance."""

import collections
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from ivtp.data import scenes as module
from ivtp.data.scenes import (
    COLORS,
    FAMILIES,
    GRID,
    KINDS,
    NUMBERS,
    PATCH,
    PLURALS,
    SPLITS,
    VOCABULARY,
    Scenes,
    data_hash,
    digit_pool,
    make_questions,
    make_scene,
)

TEST_HASH = "7b500ef0c9b2848e9967c5beafdb95cc7b4c516f9b95a1d45a9d5ae2bf690f1f"
MANY = 400


@pytest.fixture(scope="module")
def made():
    """Scenes of the test split with several questions of every family."""
    scenes = [make_scene("test", i) for i in range(MANY)]
    return [(scene, make_questions(scene, i, per_family=3)) for i, scene in enumerate(scenes)]


def _answer(text: str, objects) -> tuple[str, list[int]]:
    """Answer a question by reading its words; also the indices of the objects it asks about."""
    words = text.removesuffix(" ?").split()

    def find(color=None, kind=None):
        return [i for i, o in enumerate(objects) if color in (None, o.color) and kind in (None, o.kind)]

    def described(some):
        color = next((w for w in some if w in COLORS), None)
        kind = next((w for w in some if w in KINDS), None)
        return find(color, kind)

    def only(found):
        assert len(found) == 1, f"{text} is ambiguous"
        return found[0]

    if words[:2] == ["is", "there"]:
        found = described(words[2:])
        return ("yes" if found else "no"), found
    if words[:2] == ["how", "many"]:
        singular = {plural: kind for kind, plural in PLURALS.items()}
        found = described([singular.get(w, w) for w in words[2 : words.index("are")]])
        return NUMBERS[len(found)], found
    if words[0] == "read" or words[1] == "digit":
        which = only(described(words))
        assert objects[which].kind == "number"
        return NUMBERS[objects[which].digit], [which]
    for side in ("left", "right", "above", "below"):
        if side in words:
            at = words.index(side)
            anchor = only(described(words[at:]))
            beside = []
            for i, o in enumerate(objects):
                a = objects[anchor]
                down = (o.row + o.size / 2) - (a.row + a.size / 2)
                right = (o.column + o.size / 2) - (a.column + a.size / 2)
                if i != anchor and {"left": right < 0, "right": right > 0, "above": down < 0, "below": down > 0}[side]:
                    beside.append(i)
            other = only(beside)
            return (objects[other].kind if words[1] == "shape" else objects[other].color), [anchor, other]
    which = only(described(words))
    return (objects[which].color if words[1] == "color" else objects[which].kind), [which]


def test_scene_depends_on_split_seed_index_only():
    forwards = {i: make_scene("test", i).image for i in (0, 3, 7)}
    backwards = {i: make_scene("test", i).image for i in (7, 3, 0)}
    for i, image in forwards.items():
        assert np.array_equal(image, backwards[i])
    assert not np.array_equal(make_scene("test", 3, seed=1).image, forwards[3])
    for split in ("train", "validation"):
        assert not np.array_equal(make_scene(split, 3).image, forwards[3])


def test_committed_hash():
    assert data_hash("test", 20) == TEST_HASH


def test_data_hash_covers_images_questions_and_answers(monkeypatch):
    before = data_hash("validation", 3)
    assert before == data_hash("validation", 3)
    assert before != data_hash("validation", 4)
    original = module.make_questions

    def altered(scene, rng=0, per_family=1):
        first, *rest = original(scene, rng, per_family)
        return [
            module.Question(first.text, "no" if first.answer == "yes" else "yes", first.family, first.patches),
            *rest,
        ]

    monkeypatch.setattr(module, "make_questions", altered)
    assert data_hash("validation", 3) != before


def test_handwritten_digits_of_the_splits_are_apart():
    pools = [set(digit_pool(split).tolist()) for split in SPLITS]
    assert sum(map(len, pools)) == len(set.union(*pools)) == 1797
    assert [round(len(pool) / 1797, 1) for pool in pools] == [0.7, 0.1, 0.2]
    for split, pool in zip(SPLITS, pools, strict=True):
        drawn = {o.source for i in range(60) for o in make_scene(split, i).objects if o.kind == "number"}
        assert drawn
        assert drawn <= pool


def test_digit_says_what_the_handwriting_is(made):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for scene, _ in made[:100]:
        for o in scene.objects:
            assert (o.digit == target[o.source]) if o.kind == "number" else (o.digit == o.source == -1)


@pytest.mark.parametrize("split", SPLITS)
def test_every_family_in_every_scene(split):
    for i in range(100):
        families = [q.family for q in make_questions(make_scene(split, i), i)]
        assert families == list(FAMILIES)


def test_answers_and_patches_against_a_second_reading(made):
    for scene, questions in made:
        for q in questions:
            answer, asked = _answer(q.text, scene.objects)
            assert answer == q.answer, q
            patches = np.zeros(GRID**2, bool)
            for i in asked:
                patches |= scene.objects[i].patches
            assert np.array_equal(patches, q.patches), q
            if q.answer in ("no", "zero") and q.family != "digit":
                assert not q.patches.any()
            else:
                assert q.patches.sum() >= 16


def test_patches_are_where_the_picture_differs_from_its_background(made):
    for scene, _ in made:
        changed = np.abs(scene.image.astype(int) - scene.background).max(-1) >= 4
        changed = changed.reshape(GRID, PATCH, GRID, PATCH).any((1, 3)).reshape(-1)
        covered = np.zeros(GRID**2, bool)
        for o in scene.objects:
            assert o.patches.sum() >= 16
            assert changed[o.patches].all(), o
            assert not (covered & o.patches).any(), "objects overlap"
            covered |= o.patches
            block = np.zeros((GRID, GRID), bool)
            block[o.row : o.row + o.size, o.column : o.column + o.size] = True
            assert not (o.patches & ~block.reshape(-1)).any()
        # a faint edge of an antialiased object may touch a patch that is not counted as covered, no more
        assert (changed & ~covered).sum() <= 2 * len(scene.objects)


def test_color_of_the_pixels(made):
    for scene, _ in made[:100]:
        pixels = scene.image.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(GRID**2, -1, 3)
        for o in scene.objects:
            inside = pixels[o.patches].reshape(-1, 3).astype(float)
            brightest = inside[inside.max(1) >= np.quantile(inside.max(1), 0.8)].mean(0)
            nearest = min(COLORS, key=lambda c: np.abs(brightest - COLORS[c]).sum())
            assert nearest == o.color, (o, brightest)


def test_two_to_five_objects(made):
    counts = collections.Counter(len(scene.objects) for scene, _ in made)
    assert set(counts) == {2, 3, 4, 5}
    assert min(counts.values()) > 0.15 * MANY


def test_words(made):
    assert len(VOCABULARY) == len(set(VOCABULARY)) <= 60
    assert all(word.islower() or word == "?" for word in VOCABULARY)
    for _, questions in made:
        for q in questions:
            words = q.text.split(" ")
            assert words[-1] == "?", q.text
            assert set(words) <= set(VOCABULARY), q.text
            assert q.answer in VOCABULARY


def test_answers_are_balanced(made):
    counts = {family: collections.Counter() for family in FAMILIES}
    for _, questions in made:
        for q in questions:
            counts[q.family][q.answer] += 1
    most = {family: max(c.values()) / sum(c.values()) for family, c in counts.items()}
    limits = {"exist": 0.55, "attribute": 0.25, "digit": 0.15, "count": 0.3, "spatial": 0.3}
    assert all(most[family] <= limits[family] for family in FAMILIES), most
    assert set(counts["exist"]) == {"yes", "no"}
    assert set(counts["digit"]) == set(NUMBERS)
    assert set(counts["count"]) == set(NUMBERS[:6])
    assert set(counts["attribute"]) == set(counts["spatial"]) == {*COLORS, *KINDS}


def test_exist_does_not_leak_its_answer(made):
    """What is asked about must not tell the answer: every colour and kind is there about as often as not."""
    counts = collections.defaultdict(collections.Counter)
    for i, (scene, _) in enumerate(made):
        for q in make_questions(scene, 1000 + i, per_family=12):
            if q.family == "exist":
                for word in set(q.text.split()) & {*COLORS, *KINDS}:
                    counts[word][q.answer] += 1
    for word, c in counts.items():
        assert 0.3 < c["yes"] / sum(c.values()) < 0.72, (word, c)


def test_data_set_items():
    data = Scenes("validation", scenes=3, seed=2)
    assert len(data) == 15
    item = data[11]
    assert item["id"] == "validation-00002-attribute"
    assert item["family"] == "attribute"
    assert item["image"].size == (96, 96)
    assert item["image"].mode == "RGB"
    assert np.array_equal(np.asarray(item["image"]), make_scene("validation", 2, seed=2).image)
    assert item["patches"].dtype == torch.bool
    assert item["patches"].shape == (144,)
    again = Scenes("validation", scenes=3, seed=2)[11]
    assert (again["question"], again["answer"]) == (item["question"], item["answer"])
    assert data[-1]["id"] == "validation-00002-spatial"
    with pytest.raises(IndexError):
        data[15]


def test_scenes_are_cached():
    data = Scenes("test", scenes=2)
    assert data.scene(1)[0] is data.scene(1)[0]


@pytest.mark.parametrize("make", [lambda: make_scene("dev", 0), lambda: Scenes("dev")])
def test_unknown_split_is_named(make):
    with pytest.raises(ValueError, match="train, validation, test, got 'dev'"):
        make()


def test_import_does_not_load_scikit_learn():
    code = "import sys, ivtp.data.scenes; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_same_in_another_process():
    code = "import hashlib as h, ivtp.data.scenes as s; print(h.sha256(s.make_scene('test', 5).image).hexdigest())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == hashlib.sha256(make_scene("test", 5).image).hexdigest()


def test_what_is_asked_about_lies_in_the_grid_of_the_model():
    """LLaVA-1.5's 24 × 24 patches are quarters of the scenes' 12 × 12; in a grid of 7 × 7 nobody knows them."""
    item = next(i for i, sample in enumerate(Scenes(scenes=1)) if sample["patches"].any())
    coarse, fine = Scenes(scenes=1)[item]["patches"], Scenes(scenes=1, patch_count=576)[item]["patches"]
    row, column = torch.arange(576) // 24, torch.arange(576) % 24
    assert torch.equal(fine, coarse[row // 2 * 12 + column // 2])
    for count in (49, 143, 0):
        other = Scenes(scenes=1, patch_count=count)[item]["patches"]
        assert len(other) == count and not other.any()
