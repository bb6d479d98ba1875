"""Questions about a scene, each with one right answer; eight families."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ivtp.data.scenes2 import words
from ivtp.data.scenes2.assets import concepts
from ivtp.data.scenes2.drawing import Scene, Sign, Thing
from ivtp.data.scenes2.layout import drawable, pick, popularity

FAMILIES = ("exist", "attribute", "name", "spatial", "count", "text", "place", "logic")
NEGATIVES = ("random", "popular", "adversarial")
FORMS = ("and", "or", "but")  # of logic questions
SIDES = ("left", "right"), ("above", "below")  # of spatial questions with two answers: across, down
SALIENT = 4
"""Number of most salient objects that captions mention; half of the questions are about the others."""
_APART = 0.11  # of the side: how far two centres must differ for "left of" to be beyond doubt
_HALF = 0.08  # how far from the middle a centre must be to be "on the left"


@dataclass(frozen=True)
class Question:
    """Question; its `targets` are the objects and signs that it is about (none for "no", "0" and places).

    `negatives` is the kind of the absent object in an exist question, `size` the tier of the smallest target, `salience`
    high if a caption may mention all targets; all are "" where they do not apply. `terms` are the phrases of the text that
    name objects, places, colours or signs.
    """

    text: str
    answer: str
    family: str
    targets: tuple[Thing | Sign, ...]
    terms: tuple[str, ...] = ()
    negatives: str = ""
    size: str = field(init=False)
    salience: str = field(init=False)

    def __post_init__(self):
        things = [t for t in self.targets if isinstance(t, Thing)]
        tiers = [tier for tier in ("small", "medium", "large") if any(t.draft.tier == tier for t in things)]
        object.__setattr__(self, "size", tiers[0] if tiers else "")
        low = any(t.rank >= SALIENT for t in things)
        object.__setattr__(self, "salience", ("low" if low else "high") if things else "")


def ask_exist(rng: np.random.Generator, term: str) -> str:
    """Text of an exist question about a term."""
    if term in words.PLURAL:
        forms = (f"are there any {term} ?", f"do you see any {term} ?", f"are there {term} in the picture ?")
    elif term in words.MASS:
        forms = (f"is there any {term} ?", f"do you see any {term} ?", f"is there {term} in the picture ?")
    else:
        one = words.indefinite(term)
        forms = (f"is there {one} ?", f"do you see {one} ?", f"is there {one} in the picture ?")
    return pick(rng, forms)


def which_are_there(rng: np.random.Generator, form: str, yes: bool) -> tuple[bool, bool]:
    """Draw the presence of the two things of a logic question; the hard way to be wrong is drawn most often."""
    if form == "and":
        return (True, True) if yes else pick(rng, ((True, False), (False, True), (False, False)), (2, 2, 1))
    if form == "or":
        return pick(rng, ((True, False), (False, True), (True, True)), (2, 2, 1)) if yes else (False, False)
    return (True, False) if yes else pick(rng, ((True, True), (False, False), (False, True)), (3, 1, 1))


def ask_side(term: str, other: str, low: str, high: str) -> str:
    """Text of a spatial question with two answers, as "left" and "right"."""
    of = " of" if low == "left" else ""
    return f"{words.be(term)} the {words.singular(term)} {low} or {high}{of} the {words.singular(other)} ?"


def ask_logic(form: str, a: str, b: str) -> str:
    """Text of a logic question about two terms; form: "and", "or", "but" (a, but no b)."""
    be = "are" if a in words.PLURAL else "is"
    if form == "but":
        return f"{be} there {words.indefinite(a)} but no {words.singular(b)} ?"
    return f"{be} there {words.indefinite(a)} {form} {words.indefinite(b)} ?"


class Asker:
    """Generator of questions about one scene, with a method per family; None if the scene has no such question.

    Absent objects are drawn from the concepts of `split`.
    """

    def __init__(self, scene: Scene, split: str, rng: np.random.Generator):
        self.scene, self.split, self.rng = scene, split, rng
        self.side = scene.image.shape[0]
        self.members: dict[str, list[Thing]] = defaultdict(list)
        for thing in scene.things:
            for term in words.terms_of(thing.concept):
                self.members[term].append(thing)
        # Ambiguous terms: the photograph shows such a thing, or something else may be called so.
        self.unclear = {term for name in scene.place.shows for term in words.terms_of(name)}
        for name in {t.concept for t in scene.things}:
            for other in words.confusable(name):
                self.unclear.update(term for term in words.terms_of(other) if name not in words.terms()[term])

    def pick(self, options, weights=None):
        """Draw one option."""
        return pick(self.rng, options, weights)

    # Subjects of questions ---------------------------------------------------------------------------------------------

    def names(self, thing: Thing) -> list[str]:
        """Unambiguous names and synonyms of an object."""
        concept = concepts()[thing.concept]
        return [name for name in (concept.name, *concept.synonyms) if name not in self.unclear]

    def _wide(self, thing: Thing) -> list[str]:
        """Hypernyms of an object that questions use."""
        return [h for h in concepts()[thing.concept].hypernyms if h in words.hypernyms()]

    def unique(self) -> list[tuple[Thing, list[str]]]:
        """Objects with terms that name them alone, and these terms."""
        objects = []
        for thing in self.scene.things:
            terms = [term for term in self.names(thing) if len(self.members[term]) == 1]
            terms += [h for h in self._wide(thing) if h not in self.unclear and len(self.members[h]) == 1]
            if terms:
                objects.append((thing, terms))
        return objects

    def _fair(self, options: list, things: Callable) -> Any:
        """Draw an option, at even odds about salient objects only or about others."""
        low = [o for o in options if any(t.rank >= SALIENT for t in things(o))]
        high = [o for o in options if not any(t.rank >= SALIENT for t in things(o))]
        first, second = (low, high) if self.rng.random() < 0.5 else (high, low)
        return self.pick(first or second)

    def absent(self, kind: str) -> str:
        """Draw an unambiguous term that names nothing in the scene.

        random: any; popular: concepts by how often scenes show them; adversarial: from the theme of the scene or a
        sibling of something in the scene.
        """
        rng, things = self.rng, self.scene.things
        for _ in range(200):
            if kind == "adversarial" and rng.random() < 0.5:
                hypernyms = [h for t in things for h in concepts()[t.concept].hypernyms[:1]]
                near = self.pick(hypernyms) if hypernyms else ""
                pool = [n for n in drawable(self.split) if near in concepts()[n].hypernyms]
            elif kind == "adversarial":
                pool = [n for n in drawable(self.split) if self.scene.theme in concepts()[n].themes]
            else:
                pool = list(drawable(self.split))
            if not pool:
                continue
            name = self.pick(pool, [popularity()[n] ** 2 for n in pool]) if kind == "popular" else self.pick(pool)
            concept = concepts()[name]
            narrow = [h for h in concept.hypernyms[:1] if h in words.hypernyms()]
            term = self.pick(narrow) if narrow and rng.random() < 0.12 else self.pick((concept.name, *concept.synonyms))
            if term not in self.unclear and not self.members[term]:
                return term
        return ""

    def present(self, spoken: bool = True) -> tuple[str, list[Thing]] | None:
        """Draw an unambiguous term that names something in the scene, and the objects that it names."""
        options = []
        for thing in self.scene.things:
            terms = self.names(thing)
            if spoken and self.rng.random() < 0.15:
                terms = [h for h in self._wide(thing) if h not in self.unclear] or terms
            if terms:
                options.append((thing, terms))
        if not options:
            return None
        thing, terms = self._fair(options, lambda option: (option[0],))
        term = self.pick(terms)
        return term, self.members[term]

    # Families ------------------------------------------------------------------------------------------------------

    def exist(self) -> Question | None:
        """Ask if an object is in the image."""
        kind, yes = self.pick(NEGATIVES), self.rng.random() < 0.5
        chosen = self.present() if yes else (self.absent(kind), [])
        if not chosen or not chosen[0]:
            return None
        term, things = chosen
        text = ask_exist(self.rng, term)
        return Question(text, "yes" if yes else "no", "exist", tuple(things), (term,), kind)

    def attribute(self) -> Question | None:
        """Ask for the colour of a tinted object."""
        options = [(thing, terms) for thing, terms in self.unique() if thing.draft.tint]
        if not options:
            return None
        thing, terms = self._fair(options, lambda option: (option[0],))
        term, color = self.pick(terms), thing.draft.tint
        one, be = words.singular(term), words.be(term)
        if self.rng.random() < 0.3:
            pair = [color, self.pick([c for c in words.COLORS if c != color])]
            pair = pair[::-1] if self.rng.random() < 0.5 else pair
            return Question(f"{be} the {one} {pair[0]} or {pair[1]} ?", color, "attribute", (thing,), (term, *pair))
        text = self.pick((f"what color {be} the {one} ?", f"which color {be} the {one} ?"))
        return Question(text, color, "attribute", (thing,), (term,))

    def name(self) -> Question | None:
        """Ask for the name of the only object of a kind."""
        alone = [h for h in words.hypernyms() if h not in self.unclear and len(self.members[h]) == 1]
        options = [(self.members[h][0], h) for h in alone]
        if not options:
            return None
        thing, term = self._fair(options, lambda option: (option[0],))
        one = words.singular(term)
        text = self.pick((f"which {one} is in the picture ?", f"what {one} do you see ?", f"which {one} is there ?"))
        return Question(text, thing.concept, "name", (thing,), (term,))

    def spatial(self) -> Question | None:
        """Ask about positions of objects."""
        groups = [group for group in (self._beside(), self._where(), self._choices()) if group]
        if not groups:
            return None
        text, answer, things, terms = self._fair(self.pick(groups), lambda option: option[2])
        return Question(text, answer, "spatial", things, terms)

    def _several(self) -> list[tuple[str, list[Thing]]]:
        """Hypernyms of two or more objects with different names."""
        groups = []
        for term in words.hypernyms():
            things = self.members[term]
            if term not in self.unclear and len(things) >= 2 and len({t.concept for t in things}) == len(things):
                groups.append((term, things))
        return groups

    def _beside(self) -> list:
        """Ask for the one of several objects that is on one side of another object."""
        options = []
        for term, things in self._several():
            for other, names in self.unique():
                if other in things:
                    continue
                for side, thing in _alone(things, other.x, other.y, _APART * self.side):
                    name, spoken = self.pick(names), f"{side} of" if side in ("left", "right") else side
                    text = f"which {words.singular(term)} is {spoken} the {words.singular(name)} ?"
                    options.append((text, thing.concept, (thing, other), (term, name)))
        return options

    def _where(self) -> list:
        """Ask for the one of several objects that is in one half of the image."""
        options = []
        for term, things in self._several():
            for side, thing in _alone(things, self.side / 2, self.side / 2, _HALF * self.side):
                text = f"which {words.singular(term)} is {_HALVES[side]} ?"
                options.append((text, thing.concept, (thing,), (term,)))
        return options

    def _choices(self) -> list:
        """Ask for the side of one object on which another one is."""
        options, gap, unique = [], _APART * self.side, self.unique()
        for i, (thing, terms) in enumerate(unique):
            for other, names in unique[i + 1 :]:
                pair = (thing, terms), (other, names)
                first, second = pair if self.rng.random() < 0.5 else pair[::-1]
                term, name = self.pick(first[1]), self.pick(second[1])
                if words.terms()[term] & words.terms()[name]:
                    continue
                across, down = first[0].x - second[0].x, first[0].y - second[0].y
                both = (first[0], second[0])
                for (low, high), step in zip(SIDES, (across, down), strict=True):
                    if abs(step) >= gap:
                        options.append((ask_side(term, name, low, high), low if step < 0 else high, both, (term, name)))
        return options

    def count(self) -> Question | None:
        """Ask for a number of objects, at most four."""
        options: dict[int, list[str]] = {}
        for term in words.hypernyms():
            if term not in self.unclear and len(self.members[term]) <= 4:
                options.setdefault(len(self.members[term]), []).append(term)
        if not options:
            return None
        number = self.pick(sorted(options), [_COUNT_WEIGHTS[n] for n in sorted(options)])
        term = self.pick(options[number])
        several = words.plural(term)
        ends = "are there ?", "do you see ?", "are in the picture ?"
        text = f"how many {several} {self.pick(ends)}"
        return Question(text, str(number), "count", tuple(self.members[term]), (several,))

    def text(self) -> Question:
        """Ask for the text of a sign."""
        sign = self.pick(self.scene.signs)
        kind, color = sign.draft.kind, sign.draft.color
        texts = [f"what does the {color} sign say ?", f"what is written on the {color} sign ?"]
        terms: tuple[str, ...] = (color,)
        if kind == "price" and self.rng.random() < 0.5:
            texts, terms = ["what is the price ?", "how much does it cost ?"], ()
        elif kind == "number" and self.rng.random() < 0.5:
            texts = [f"which number is on the {color} sign ?"]
        elif len(self.scene.signs) == 1 and self.rng.random() < 0.5:
            texts, terms = ["what does the sign say ?", "what is written on the sign ?"], ()
        return Question(self.pick(texts), sign.draft.text, "text", (sign,), terms)

    def place(self) -> Question:
        """Ask for the place that the photograph shows."""
        if self.rng.random() < 0.3:
            both = ("indoors", "outdoors")
            return Question("is this indoors or outdoors ?", self.scene.place.where, "place", (), both)
        text = self.pick(("where is this ?", "what place is this ?", "which place does the picture show ?"))
        return Question(text, self.scene.place.place, "place", ())

    def logic(self) -> Question | None:
        """Ask about the presence of two objects, joined by and, or, but."""
        rng = self.rng
        form, yes = self.pick(FORMS), rng.random() < 0.5
        there = which_are_there(rng, form, yes)
        chosen: list[tuple[str, list[Thing]]] = []
        for wanted in there:
            for _ in range(20):
                one = self.present(spoken=False) if wanted else (self.absent(self.pick(NEGATIVES)), [])
                if one and one[0] and not any(words.terms()[one[0]] & words.terms()[term] for term, _ in chosen):
                    chosen.append(one)
                    break
        if len(chosen) < 2:
            return None
        (a, first), (b, second) = chosen
        text = ask_logic(form, a, b)
        return Question(text, "yes" if yes else "no", "logic", (*first, *second), (a, b))


_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
_HALVES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
_COUNT_WEIGHTS = {0: 1.0, 1: 1.0, 2: 1.35, 3: 2.1, 4: 3.4}  # rare counts are drawn more often


def _alone(things: list[Thing], x: float, y: float, gap: float) -> Iterator[tuple[str, Thing]]:
    """Sides of a point on which one of the objects is alone and all others are opposite, with that object."""
    for side, (right, down) in _DIRECTIONS.items():
        ahead = [right * (t.x - x) + down * (t.y - y) for t in things]
        if sum(a >= gap for a in ahead) == 1 and sum(a <= -gap for a in ahead) == len(things) - 1:
            yield side, things[int(np.argmax(ahead))]


def make_questions(
    scene: Scene, split: str, rng: np.random.Generator, mix: dict[str, int] | None = None
) -> list[Question]:
    """Draw questions of every family, in the order of `FAMILIES`; the same one may come twice.

    `mix` is the number of questions per family, by default one of each. Raises ValueError if a family has no question.
    """
    asker = Asker(scene, split, rng)
    questions = []
    for family in FAMILIES:
        for _ in range((mix or {}).get(family, 0 if mix else 1)):
            question = getattr(asker, family)()
            if question is None:
                raise ValueError(f"no {family} question about this scene")
            questions.append(question)
    return questions
