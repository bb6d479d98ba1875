"""Words of `scenes2`: terms and what they stand for, plurals, articles, colours, signs."""

from functools import cache

from ivtp.data.scenes2.assets import concepts, places

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
SIGN_COLORS = {
    "red": ((190, 30, 35), (255, 255, 255)),
    "green": ((25, 110, 60), (255, 255, 255)),
    "blue": ((25, 60, 150), (255, 255, 255)),
    "yellow": ((250, 210, 40), (20, 20, 20)),
    "white": ((245, 245, 240), (20, 20, 20)),
    "black": ((25, 25, 28), (255, 255, 255)),
}
SIGN_WORDS = tuple(
    "open closed exit enter sale cafe bakery market garage parking stop slow wait push pull free sold new hot cold fresh "
    "lunch dinner menu pay cash tour info help police museum theater cinema circus library gym spa staff only quiet danger "
    "caution private public north south east west today monday friday sunday summer winter spring autumn hello welcome "
    "thanks peace dream happy lucky rent music dance sport fashion design coffee tickets taxis".split()
)
PRICES = tuple(f"${n}" for n in range(2, 100))
NUMBERS = tuple(str(n) for n in range(10, 100))
COUNTS = ("0", "1", "2", "3", "4")
SIDES = ("left", "right", "above", "below")

# Spoken form of hypernyms that do not count by themselves: singular, plural.
_SPOKEN = {
    "furniture": ("piece of furniture", "pieces of furniture"),
    "clothing": ("piece of clothing", "pieces of clothing"),
    "instrument": ("musical instrument", "musical instruments"),
    "food": ("kind of food", "kinds of food"),
}
NOT_ASKED = frozenset({"stationery", "money", "food"})
"""Hypernyms without a natural question of their own ("how many foods")."""
PLURAL = frozenset(
    "grapes fries glasses sunglasses scissors headphones chopsticks jeans shorts maracas pliers".split()
)
"""Names that are plural by themselves."""
MASS = frozenset(
    "corn garlic broccoli bread cheese meat bacon salad popcorn butter pasta sushi rice chocolate honey milk coffee champagne "
    "wine beer whiskey soda juice yarn thread lightning fire dna soap maize flame lotion".split()
)
"""Names that are not counted."""
# What one picture could be called by either name: where one is there, the others of its group are not asked about.
CONFUSABLE = [
    {name.strip() for name in group.split(",")}
    for group in """car, taxi, police car, racing car, van, truck
    train, locomotive, tram, bus
    ship, motorboat, rowboat, sailboat, canoe
    scooter, motorcycle, bicycle, tricycle
    ambulance, van, bus, fire truck
    chair, armchair, stool, bench, deck chair, sofa
    bed, crib, sofa
    table, desk, pool table, workbench
    mug, coffee, bowl
    cake, cupcake, pie, pudding
    bread, baguette, sandwich
    lamp, lamppost, lantern, chandelier, candle, bulb
    clock, alarm clock, watch, stopwatch, mantelpiece clock, school
    handbag, purse, shopping bag, backpack, money bag
    glasses, sunglasses
    computer, laptop, tablet, television
    mobile phone, telephone, tablet
    camera, video camera
    dog, wolf
    cat, tiger, leopard, lion
    mouse, hamster, chipmunk
    horse, donkey, zebra, rocking horse
    fish, shark, aquarium, fishing rod
    whale, dolphin, seal, shark
    octopus, squid
    lobster, shrimp
    beetle, ladybug
    fly, mosquito, bee
    oak, pine, palm, christmas tree, bush
    potted plant, sprout, clover, bush, cactus, maple leaf
    rose, tulip, hibiscus, sunflower, lotus, hyacinth, cherry blossom, bouquet, potted plant
    pepper, chili
    book, notebook, folder, calendar
    pen, pencil, crayon, paintbrush
    box, gift, crate
    trash can, bucket, basket
    house, dog house, doll house, tent, hotel, bank, school, hospital, store
    doll, teddy bear
    star, sun
    shirt, jacket, coat, suit
    glove, boxing glove
    racket, tennis racket, paddle
    ice skate, roller skate, skateboard, sneaker, boot
    radio, speaker
    chick, chicken, rooster, turkey
    duck, goose, swan
    rice, rice ball
    wine, cocktail, champagne, wine bottle, whiskey
    guitar, banjo, violin
    suitcase, briefcase
    ring, gem, crown
    fireplace, fire, candle, lantern
    cake, candle
    mouse trap, mouse, cheese
    snowman, top hat
    map, globe
    helmet, cap, graduation cap
    sun hat, top hat, cap
    umbrella, parasol
    keyboard, piano
    joystick, gamepad
    coin, medal
    knife, chopping board
    flask, test tube
    safe, wardrobe
    barrel, drum
    letter, ticket
    cloud, lightning
    church, castle, mosque
    monkey, gorilla
    elevator, door, wardrobe
    mushroom, pizza
    lemon, lime
    teapot, mug
    plate, bowl, pot
    pool ball, pool table
    tie, scarf, shirt, suit
    turtle, snail
    stone, brick
    hook, anchor
    plug, battery
    painting, map
    mirror, window
    ski, sled
    water pistol, drill
    sink, bathtub, toilet
    refrigerator, washing machine, safe
    oven, microwave, washing machine""".split("\n")
]


@cache
def terms() -> dict[str, frozenset[str]]:
    """What questions call objects by, and the concepts that each term covers."""
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
    """All terms that cover a concept; none for a name that is no concept."""
    return tuple(term for term, covered in terms().items() if name in covered)


@cache
def hypernyms() -> tuple[str, ...]:
    """Hypernyms that questions use."""
    return tuple(sorted({h for c in concepts().values() for h in c.hypernyms} - NOT_ASKED))


@cache
def confusable(name: str) -> frozenset[str]:
    """Other concepts whose pictures could be called by this name."""
    return frozenset(set().union(*(group for group in CONFUSABLE if name in group)) - {name})


def singular(term: str) -> str:
    """How a question says one of a term."""
    return _SPOKEN[term][0] if term in _SPOKEN else term


def plural(term: str) -> str:
    """How a question says several of a hypernym."""
    if term in _SPOKEN:
        return _SPOKEN[term][1]
    front, last = term[:-1], term[-1]
    return f"{term}es" if last in "sxh" else f"{front}ies" if last == "y" and front[-1] not in "aeiou" else f"{term}s"


def be(term: str) -> str:
    """Verb that goes with a term."""
    return "are" if term in PLURAL else "is"


def indefinite(term: str) -> str:
    """A term with its article: "an apple", "some milk"."""
    if term in MASS or term in PLURAL:
        return f"some {term}"
    spoken = singular(term)
    return f"{'an' if spoken[0] in 'aeiou' and not spoken.startswith(('uf', 'un')) else 'a'} {spoken}".replace("a umbrella", "an umbrella")


FUNCTION = frozenset(
    "is are there a an any some the do does you see in picture what which color or where this place show say written sign "
    "number price how much it cost many and but no yes left right above below at top bottom of on ?".split()
)
"""Words of the questions and answers that are neither objects, colours, places nor on signs."""


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of questions, answers and captions; numbers and prices by their digits."""
    phrases = [*FUNCTION, *COLORS, *SIGN_WORDS, *"$0123456789", "indoors", "outdoors"]
    phrases += [place.place for place in places("test")]
    phrases += [singular(term) for term in terms()] + [plural(term) for term in hypernyms()]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))
