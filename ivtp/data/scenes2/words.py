"""Words of `scenes2`: terms and their concepts, plurals, articles, colours, signs."""

from functools import cache
from pathlib import Path

from ivtp.data.scenes2.assets import concepts, places


def _listed(text: str, between: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(between))


COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
SIGN_COLORS = {
    "red": ((190, 30, 35), (255, 255, 255)),
    "green": ((25, 110, 60), (255, 255, 255)),
    "blue": ((25, 60, 150), (255, 255, 255)),
    "yellow": ((250, 210, 40), (20, 20, 20)),
    "white": ((245, 245, 240), (20, 20, 20)),
    "black": ((25, 25, 28), (255, 255, 255)),
}
SIGN_WORDS = _listed(
    "open closed exit enter sale cafe bakery market garage parking stop slow wait push pull free sold new hot cold fresh "
    "lunch dinner menu pay cash tour info help police museum theater cinema circus library gym spa staff only quiet danger "
    "caution private public north south east west today monday friday sunday summer winter spring autumn hello welcome "
    "thanks peace dream happy lucky rent music dance sport fashion design tea news rooms"
)
PRICES = tuple(f"${n}" for n in range(2, 100))
NUMBERS = tuple(str(n) for n in range(10, 100))

# Phrases for hypernyms that cannot be counted: singular, plural.
_SPOKEN = {
    "furniture": ("piece of furniture", "pieces of furniture"),
    "clothing": ("piece of clothing", "pieces of clothing"),
    "instrument": ("musical instrument", "musical instruments"),
    "food": ("kind of food", "kinds of food"),
}
NOT_ASKED = frozenset({"stationery", "money", "food"})
"""Hypernyms without a natural question of their own ("how many foods")."""
_OWN_COLOR = frozenset({"animal", "plant", "fruit", "vegetable", "food", "drink", "money"})
_ALWAYS = frozenset(
    _listed(
        "stop sign, traffic light, barber pole, traffic cone, cloud, sun, moon, star, rainbow, lightning, snowflake, "
        "snowman, tornado, fire, drop, pumpkin, palette, painting, newspaper, globe, map, chart, dna, log, stone, brick, "
        "rubik cube, chessboard, target, shell, fire truck, ambulance, taxi, hydrant, fire extinguisher, whiteboard, "
        "fireplace, aquarium, mirror, window, gem, ring, medal, trophy, crown, dice",
        ", ",
    )
)


def any_color(name: str) -> bool:
    """True if a concept comes in any colour, as cars and mugs do, and lions and lemons do not."""
    return name not in _ALWAYS and not _OWN_COLOR & set(concepts()[name].hypernyms)


PLURAL = frozenset(
    _listed("grapes fries glasses sunglasses scissors headphones chopsticks jeans shorts maracas pliers")
)
"""Names in the plural form."""
MASS = frozenset(
    _listed(
        "corn garlic broccoli bread cheese meat bacon salad popcorn butter pasta sushi rice chocolate honey milk coffee "
        "champagne wine beer whiskey soda juice yarn thread lightning fire dna soap maize flame lotion"
    )
)
"""Names of uncountable things."""


@cache
def terms() -> dict[str, frozenset[str]]:
    """Terms for objects in questions → the concepts that each covers."""
    table: dict[str, set[str]] = {}
    for concept in concepts().values():
        for term in (concept.name, *concept.synonyms):
            table.setdefault(term, set()).add(concept.name)
    for concept in concepts().values():
        for term in concept.hypernyms:
            table.setdefault(term, set()).add(concept.name)
    return {term: frozenset(covered) for term, covered in table.items()}


@cache
def terms_of(name: str) -> tuple[str, ...]:
    """Terms that cover a concept; none for a name without a concept."""
    return tuple(term for term, covered in terms().items() if name in covered)


@cache
def hypernyms() -> tuple[str, ...]:
    """Hypernyms that questions use."""
    return tuple(sorted({h for c in concepts().values() for h in c.hypernyms} - NOT_ASKED))


LOOKALIKES = tuple(
    frozenset(line.split(", ")) for line in Path(__file__).with_name("lookalikes.txt").read_text("utf-8").splitlines()
)
"""Groups of concepts whose drawings may be called by each other's name."""


@cache
def confusable(name: str) -> frozenset[str]:
    """Other concepts whose drawings may be called by this name."""
    return frozenset(set().union(*(group for group in LOOKALIKES if name in group)) - {name})


def singular(term: str) -> str:
    """Phrase for one object of a term."""
    return _SPOKEN[term][0] if term in _SPOKEN else term


def plural(term: str) -> str:
    """Phrase for several objects of a hypernym."""
    if term in _SPOKEN:
        return _SPOKEN[term][1]
    front, last = term[:-1], term[-1]
    return f"{term}es" if last in "sxh" else f"{front}ies" if last == "y" and front[-1] not in "aeiou" else f"{term}s"


def be(term: str) -> str:
    """Verb that goes with a term."""
    return "are" if term in PLURAL else "is"


def indefinite(term: str) -> str:
    """Term with its article: "an apple", "some milk"."""
    if term in MASS or term in PLURAL:
        return f"some {term}"
    spoken = singular(term)
    return f"{'an' if spoken[0] in 'aeio' or spoken.startswith(('um', 'hour')) else 'a'} {spoken}"


FUNCTION = frozenset(
    _listed(
        "is are there a an any some the do does you see in picture what which color or where this place show say written sign "
        "number price how much it cost many and but no yes left right above below at top bottom of on ?"
    )
)
"""Words of the questions and answers that are neither objects, colours, places nor on signs."""


@cache
def vocabulary() -> tuple[str, ...]:
    """Words of questions, answers and captions; numbers and prices by their digits."""
    phrases = [*FUNCTION, *COLORS, *SIGN_WORDS, *"$0123456789", "indoors", "outdoors"]
    phrases += [place.place for place in places("test")]
    phrases += [singular(term) for term in terms()] + [plural(term) for term in hypernyms()]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))
