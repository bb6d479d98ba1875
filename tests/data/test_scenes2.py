"""scenes2: answers read again from the scene, visibility, balance, splits, seeds, assets and their licences."""

import collections
import csv
import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from ivtp.data.scenes2 import FAMILIES, SPLITS, Scenes2, assets, data_hash, make_questions, make_scene, words
from ivtp.data.scenes2.drawing import VISIBLE, coverage
from ivtp.data.scenes2.layout import TIERS, compose, drawable

TEST_HASH = "ddbf2a4ee8266ced63ca0a56653fb1c6d8ed996ad57c41dd4604b4e5f318f6c0"  # of what is drawn and asked
TEST_COLORS = [  # mean of the pictures
    [135.0, 120.6, 86.6],
    [103.0, 109.1, 90.9],
    [135.2, 128.5, 101.9],
    [150.7, 130.5, 104.3],
    [141.9, 144.1, 152.2],
    [146.6, 135.6, 74.6],
]
MANY = 60
MIX = dict.fromkeys(FAMILIES, 4)
INDEX = json.loads((assets.FOLDER / "index.json").read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in INDEX["concepts"]}


@pytest.fixture(scope="module")
def made():
    """Scenes of two splits with several questions of every family."""
    return [make_scene(split, i, mix=MIX) for split in ("train", "test") for i in range(MANY)]


def _covered(phrase: str) -> set[str]:
    """Concepts that a phrase of a question covers, from the index alone; none if it names nothing."""
    phrase = re.sub(r"^(an?|some|any|the) ", "", phrase)
    names = {row["name"] for row in ROWS.values() if phrase in (row["name"], *row["synonyms"])}
    for hypernym in {h for row in ROWS.values() for h in row["hypernyms"]}:
        if phrase in (hypernym, words.singular(hypernym), words.plural(hypernym)):
            names |= {row["name"] for row in ROWS.values() if hypernym in row["hypernyms"]}
    return names


class Reader:
    """Answer questions by their words, from what the scene holds; fails where a question is ambiguous."""

    def __init__(self, scene):
        self.scene, self.side = scene, scene.image.shape[0]
        first = len(scene.signs)
        where = [np.argwhere(scene.owner == first + i).mean(0) for i in range(len(scene.things))]
        self.centers = {id(t): (x, y) for t, (y, x) in zip(scene.things, where, strict=True)}

    def find(self, phrase: str) -> list:
        covered = _covered(phrase)
        assert covered, f"{phrase!r} names nothing"
        assert not covered & self.scene.place.shows, f"the photograph may show {phrase!r}"
        for thing in self.scene.things:
            if thing.concept not in covered:
                doubtful = covered & words.confusable(thing.concept)
                assert not doubtful, f"{thing.concept!r} could be called {phrase!r}"
        return [t for t in self.scene.things if t.concept in covered]

    def one(self, phrase: str):
        (thing,) = self.find(phrase)
        return thing

    def exist(self, text: str):
        phrase = re.fullmatch(r"(?:is there|are there|do you see) (.+?)(?: in the picture)? \?", text)[1]
        found = self.find(phrase)
        return "yes" if found else "no", found

    def attribute(self, text: str):
        if choice := re.fullmatch(r"(?:is|are) the (.+) (\w+) or (\w+) \?", text):
            thing = self.one(choice[1])
            assert thing.draft.tint in choice.groups()[1:]
        else:
            thing = self.one(re.fullmatch(r"(?:what|which) color (?:is|are) the (.+) \?", text)[1])
        return thing.draft.tint, [thing]

    def name(self, text: str):
        phrase = re.fullmatch(r"(?:which|what) (.+?) (?:is in the picture|do you see|is there) \?", text)[1]
        thing = self.one(phrase)
        return thing.concept, [thing]

    def beyond(self, side: str, thing, other=None) -> float:
        """How far a thing lies on a side of another one, or of the middle, in shares of the picture."""
        x, y = self.centers[id(thing)]
        a, b = self.centers[id(other)] if other else (self.side / 2, self.side / 2)
        return {"left": a - x, "right": x - a, "above": b - y, "top": b - y, "below": y - b, "bottom": y - b}[
            side
        ] / self.side

    def spatial(self, text: str):
        if choice := re.fullmatch(r"(?:is|are) the (.+) (left|above) or (right|below) (?:of )?the (.+) \?", text):
            thing, other = self.one(choice[1]), self.one(choice[4])
            assert thing is not other
            (side,) = (s for s in choice.groups()[1:3] if self.beyond(s, thing, other) > 0.02)
            return side, [thing, other]
        if beside := re.fullmatch(r"which (.+) is (left|right|above|below) (?:of )?the (.+) \?", text):
            group, side, other = self.find(beside[1]), beside[2], self.one(beside[3])
        else:
            where = re.fullmatch(r"which (.+) is (?:on|at) the (left|right|top|bottom) \?", text)
            group, side, other = self.find(where[1]), where[2], None
        assert len(group) >= 2 and other not in group
        (thing,) = (t for t in group if self.beyond(side, t, other) > 0.02)
        assert all(self.beyond(side, t, other) < -0.02 for t in group if t is not thing)
        return thing.concept, [thing, *([other] if other else [])]

    def count(self, text: str):
        found = self.find(re.fullmatch(r"how many (.+?) (?:are there|do you see|are in the picture) \?", text)[1])
        return str(len(found)), found

    def text(self, text: str):
        signs = self.scene.signs
        if color := re.search(r"the (\w+) sign", text):
            signs = [s for s in signs if s.draft.color == color[1]]
        elif "price" in text or "cost" in text:
            signs = [s for s in signs if s.draft.text.startswith("$")]
        (sign,) = signs
        return sign.draft.text, [sign]

    def place(self, text: str):
        return (self.scene.place.where if "indoors" in text else self.scene.place.place), []

    def logic(self, text: str):
        body = re.fullmatch(r"(?:is|are) there (.+) \?", text)[1]
        for link, holds in (
            (" but no ", lambda a, b: a and not b),
            (" and ", lambda a, b: a and b),
            (" or ", lambda a, b: a or b),
        ):
            for match in re.finditer(link, body):
                first, second = body[: match.start()], body[match.end() :]
                if _covered(first) and _covered(second):
                    a, b = self.find(first), self.find(second)
                    return ("yes" if holds(a, b) else "no"), [*a, *b]
        raise AssertionError(f"{text!r} cannot be read")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_against_a_second_reading(made, family):
    seen = 0
    for scene, questions in made:
        reader = Reader(scene)
        for question in (q for q in questions if q.family == family):
            answer, targets = getattr(reader, family)(question.text)
            assert answer == question.answer, question
            assert {id(t) for t in targets} == {id(t) for t in question.targets}, question
            seen += 1
    assert seen == 4 * len(made)


def test_every_object_is_visible_and_where_its_patches_say(made):
    for scene, _ in made:
        assert 5 <= len(scene.things) <= 9
        first, grid = len(scene.signs), scene.image.shape[0] // 8
        shown = coverage(scene.owner, first + len(scene.things), grid)
        for i, target in enumerate((*scene.signs, *scene.things)):
            pixels = scene.owner == i
            patches = pixels.reshape(grid, 8, grid, 8).sum((1, 3)).reshape(-1) >= 4
            assert np.array_equal(patches, target.patches) and np.array_equal(patches, shown[i])
            assert patches.any()
        for thing in scene.things:
            assert thing.visible >= VISIBLE
        assert sorted(t.rank for t in scene.things) == list(range(len(scene.things)))


def test_patches_of_another_grid_cover_the_same_pixels(made):
    scene, questions = made[0]
    question = next(q for q in questions if q.targets)
    fine, coarse = scene.patches(question.targets, 36), scene.patches(question.targets, 18)
    assert set(np.flatnonzero(fine.reshape(18, 2, 18, 2).any((1, 3)))) >= set(np.flatnonzero(coarse))
    assert not scene.patches((), 18).any()


def test_a_tint_is_the_color_of_most_pixels():
    centers = {"red": 0, "orange": 17, "yellow": 38, "green": 86, "blue": 156, "purple": 196, "pink": 231}
    shares = collections.defaultdict(list)
    for i in range(40):
        scene, _ = make_scene("validation", i)
        for j, thing in enumerate(scene.things):
            pixels = scene.image[scene.owner == len(scene.signs) + j]
            hue, saturation, value = np.asarray(Image.fromarray(pixels[None]).convert("HSV"))[0].astype(int).T
            tint = thing.draft.tint
            if tint in centers:
                shows = (abs((hue - centers[tint] + 128) % 256 - 128) <= 14) & (saturation > 40)
            elif tint:
                shows = (value > 170) & (saturation < 40) if tint == "white" else value < 90
            else:
                continue
            assert words.any_color(thing.concept)
            shares[tint].append(shows.mean())
            assert shares[tint][-1] > 0.35, (thing.concept, tint)
    assert set(shares) == set(words.COLORS)
    assert np.median(np.concatenate(list(shares.values()))) > 0.7


def test_scene_depends_on_split_seed_index_and_size_only():
    forwards = [make_scene("test", i)[0].image for i in (0, 3)]
    backwards = [make_scene("test", i)[0].image for i in (3, 0)]
    assert np.array_equal(forwards[0], backwards[1]) and np.array_equal(forwards[1], backwards[0])
    others = [make_scene("test", 3, seed=1), make_scene("train", 3), make_scene("validation", 3)]
    assert not any(np.array_equal(scene.image, forwards[1]) for scene, _ in others)
    assert make_scene("test", 0, size=192)[0].image.shape == (192, 192, 3)


def test_committed_scenes():
    """What is drawn and asked is the same to the letter; pixels may differ by a few levels between Pillow's versions."""
    digest, colors = hashlib.sha256(), []
    for i in range(6):
        scene, questions = make_scene("test", i)
        digest.update(repr([(t.draft, round(t.x), round(t.y)) for t in (*scene.things, *scene.signs)]).encode())
        digest.update(repr([(q.family, q.text, q.answer) for q in questions]).encode())
        colors.append(scene.image.mean((0, 1)))
    assert np.abs(np.array(colors) - TEST_COLORS).max() < 0.5, np.round(colors, 1).tolist()
    assert digest.hexdigest() == TEST_HASH


def test_same_in_another_process_which_needs_pillow_and_numpy_only():
    code = (
        "import sys; from ivtp.data.scenes2 import data_hash; print(data_hash('validation', 2)); "
        "sys.exit(any(name in sys.modules for name in ('sklearn', 'cairosvg', 'OpenEXR', 'fontTools', 'transformers')))"
    )
    env = {"PYTHONHASHSEED": "5", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert run.stdout.strip() == data_hash("validation", 2)


def test_answers_are_balanced(made):
    counts = {family: collections.Counter() for family in FAMILIES}
    for _, questions in made:
        for q in questions:
            counts[q.family][q.answer] += 1
    share = {family: max(c.values()) / sum(c.values()) for family, c in counts.items()}
    limits = {
        "exist": 0.57,
        "attribute": 0.22,
        "name": 0.08,
        "spatial": 0.27,
        "count": 0.32,
        "text": 0.1,
        "logic": 0.57,
    }
    assert all(share[family] <= limit for family, limit in limits.items()), share
    assert set(counts["exist"]) == set(counts["logic"]) == {"yes", "no"}
    assert set(counts["count"]) == {"0", "1", "2", "3", "4"}
    assert set(counts["attribute"]) == set(words.COLORS)
    assert len(counts["name"]) > 100


def test_targets_are_small_and_half_of_them_not_salient(made):
    questions = [q for _, some in made for q in some]
    areas = [scene.patches(q.targets, 18).mean() for scene, some in made for q in some if q.targets]
    assert np.median(areas) <= 0.12
    salience = collections.Counter(q.salience for q in questions if q.salience)
    assert 0.4 <= salience["low"] / salience.total() <= 0.75
    sizes = collections.Counter(t.draft.tier for scene, _ in made for t in scene.things)
    assert set(sizes) == set(TIERS) and sizes["large"] < sizes["small"]


def test_absent_objects_are_of_three_kinds(made):
    kinds = {}
    for scene, questions in made:
        for q in questions:
            if q.family == "exist" and q.answer == "no":
                themes = {theme for name in _covered(q.terms[0]) for theme in ROWS[name]["themes"]}
                kinds.setdefault(q.negatives, []).append(scene.theme in themes)
    assert set(kinds) == {"random", "popular", "adversarial"}
    assert np.mean(kinds["adversarial"]) > np.mean(kinds["random"]) + 0.2


def test_co_occurrence(made):
    """The theme of a scene holds more of its objects than of all objects."""
    inside = [scene.theme in ROWS[t.concept]["themes"] for scene, _ in made for t in scene.things]
    assert np.mean(inside) > 0.35


def test_splits_are_apart():
    fonts = [set(assets.fonts(split)) for split in ("train", "validation", "test")]
    assert all(fonts) and len(set.union(*fonts)) == sum(map(len, fonts))
    held_out = {place.name for place in assets.places("test") if place.split != "train"}
    assert len(held_out) == 3
    assert not held_out & {place.name for split in ("train", "validation") for place in assets.places(split)}
    for name in ROWS:
        furniture = {s: set(dict(assets.views(name, s)).get("furniture", ())) for s in ("train", "validation", "test")}
        if len(ROWS[name]["views"].get("furniture", ())) > 1:
            assert not furniture["test"] & (furniture["train"] | furniture["validation"]), name
        assert drawable("train").count(name) == drawable("test").count(name) == 1
    for split, sheets in (("style", {"twemoji"}), ("wild", {"wild"})):
        used = {d.sheet for i in range(8) for d in compose(np.random.default_rng(i), split, 144).objects}
        assert used == sheets
    assert not any(
        s in ("twemoji", "wild") for name in ROWS for split in ("train", "test") for s, _ in assets.views(name, split)
    )


def test_directions_of_the_splits_are_apart():
    ends = {}
    for number, split in enumerate(("train", "validation", "test")):
        for i in range(200):
            layout = compose(np.random.default_rng((number, i)), split, 144)
            if layout.place.split == "train":
                start, _, view, _ = layout.camera
                ends.setdefault(split, []).append((start, start + view))
    low, high = (
        {s: f(e) for s, e in ends.items()} for f in (lambda e: min(a for a, _ in e), lambda e: max(b for _, b in e))
    )
    assert (
        high["train"] <= low["validation"] + 1e-9
        and high["validation"] <= low["test"] + 1e-9
        and high["test"] <= 1 + 1e-9
    )


def test_terms_mean_one_thing():
    """A name is no other concept's name or synonym, and the groups of look-alikes hold known names."""
    owners = collections.defaultdict(set)
    for row in ROWS.values():
        for term in (row["name"], *row["synonyms"]):
            owners[term].add(row["name"])
    assert not {term: names for term, names in owners.items() if len(names) > 1}
    assert not set(owners) & {h for row in ROWS.values() for h in row["hypernyms"]} - {"bush"}
    assert not {name for group in words.LOOKALIKES for name in group} - set(ROWS)
    assert not (words.PLURAL | words.MASS) - set(owners)
    assert not set(owners) & {*words.COLORS, *words.SIGN_WORDS}


def test_words_and_pieces(made):
    known = set(words.vocabulary())
    assert 700 <= len(known) <= 1100
    llama, clip = (PreTrainedTokenizerFast.from_pretrained(assets.FOLDER / name) for name in ("llama", "clip"))
    for _, questions in made:
        for q in questions:
            said = f"{q.text} {q.answer}".split()
            assert all(
                w in known or w in words.NUMBERS or w in words.PRICES or w in ("0", "1", "2", "3", "4") for w in said
            ), q
            ids = llama(f"<image> {q.text} {q.answer}")["input_ids"]
            assert llama.unk_token_id not in ids
            start = len(llama(f"<image> {q.text}")["input_ids"])
            assert llama.decode(ids[start:]).strip() == q.answer
            marked = clip(q.text)["input_ids"]
            assert marked.count(clip.eos_token_id) == 1
            assert clip.decode(marked[1:-1]).replace(" ", "") == q.text.replace(" ", "")
    split = sum(len(llama.tokenize(word)) > 1 for word in known) / len(known)
    assert 0.3 < split < 0.6  # real pieces: many words are more than one
    assert llama.tokenize("teddy") == ["▁t", "ed", "dy"]
    assert clip.eos_token_id != 2  # transformers would pool at the wrong place


def test_assets_are_small_and_credited():
    files = [file for file in assets.FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    with (assets.FOLDER / "LICENSES/credits.csv").open(encoding="utf-8", newline="") as file:
        credits = list(csv.DictReader(file))
    told = {(row["sheet"], int(row["cell"])): row for row in credits}
    assert len(told) == len(credits)
    used = {
        (sheet, cell): name for name, row in ROWS.items() for sheet, cells in row["views"].items() for cell in cells
    }
    used |= {("panoramas", i): place["place"] for i, place in enumerate(INDEX["places"])}
    assert set(used) <= set(told)
    assert all(told[key]["shows"] == name for key, name in used.items())
    assert {key for key in told if key not in used} == {("glyphs", i) for i in range(len(INDEX["glyphs"]["fonts"]))}
    texts = {file.stem for file in (assets.FOLDER / "LICENSES").glob("*.txt")}
    for row in credits:
        assert row["licence"] in texts | {"public domain"} and row["author"] and row["source"], row
    assert not [row for row in credits if "Reallusion" in row["source"]]  # people
    for name in {sheet for sheet, _ in told} - {"glyphs"}:
        with Image.open(assets.FOLDER / f"{name}.webp") as image:
            assert image.format == "WEBP"


def test_data_set_items():
    data = Scenes2("validation", scenes=2, seed=2, grid=12)
    assert len(data) == 16
    item = data[9]
    assert item["id"] == "validation-00001-attribute" and item["image_id"] == "validation-00001"
    assert item["image"].size == (144, 144) and item["image"].mode == "RGB"
    assert item["patches"].dtype == torch.bool and item["patches"].shape == (144,) and item["patches"].any()
    hard = item["difficulty"]
    assert hard["size"] in TIERS and hard["salience"] in ("low", "high") and hard["place"] in ("seen", "new")
    assert data[8]["difficulty"]["negatives"] and "negatives" not in hard
    assert data[-1]["id"] == "validation-00001-logic"
    again = Scenes2("validation", scenes=2, seed=2)[9]
    assert (again["question"], again["answer"], again["patches"].shape) == (item["question"], item["answer"], (324,))
    with pytest.raises(IndexError):
        data[16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "train, validation, test, style, wild, got 'dev'"),
        ({"size": 150}, "144, 192, got 150"),
        ({"scenes": 0}, "between 1 and 1000000, got 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Scenes2(**settings)


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_family(split):
    for i in range(6):
        scene, questions = make_scene(split, i)
        assert [q.family for q in questions] == list(FAMILIES)
        again = make_questions(scene, split, np.random.default_rng(1), {"logic": 3})
        assert [q.family for q in again] == ["logic"] * 3
