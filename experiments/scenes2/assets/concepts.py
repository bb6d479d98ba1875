"""Read concepts.txt and furniture.txt: names, synonyms, hypernyms, themes, and which pictures show a concept."""

import re
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass
class Concept:
    """A kind of object.

    Args:
        name: as answers call it.
        synonyms: other names, used in questions.
        hypernyms: one or two, narrow first.
        themes: where it is usually found.
        labels: emoji labels that show it.
        furniture: names in the furniture catalogues that show it.
    """

    name: str
    synonyms: list[str]
    hypernyms: list[str]
    themes: list[str]
    labels: list[str] = field(default_factory=list)
    furniture: list[str] = field(default_factory=list)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split("/")]


def _chain(text: str, separator: str) -> list[str]:
    return [word.strip() for word in text.split(separator) if word.strip() != "-"]


def read() -> list[Concept]:
    """All concepts, in the order of the files."""
    concepts: dict[str, Concept] = {}
    text = "\n".join(line for line in (HERE / "concepts.txt").read_text().splitlines() if not line.startswith("#"))
    for head, body in re.findall(r"\[([^\]]*)\]\n([^\[]*)", text):
        chain, themes = head.split("|")
        for entry in body.replace("\n", " ").split(","):
            if not (entry := entry.strip()):
                continue
            entry, *more = entry.split("@")
            labels, _, names = entry.partition("=")
            if not names:
                labels, names = _names(labels)[0], labels
            name, *synonyms = _names(names)
            concept = Concept(name.lower(), synonyms, _chain(chain, "<"), (more[0] if more else themes).split())
            concept.labels = [label.strip() for label in labels.split("+")]
            if concept.name in concepts:
                raise ValueError(f"concept {concept.name!r} is named twice")
            concepts[concept.name] = concept
    for line in (HERE / "furniture.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        head, _, shown = line.partition(" : ")
        names, *rest = head.split("|")
        name, *synonyms = _names(names)
        if rest:
            if name in concepts:
                raise ValueError(f"concept {name!r} is in both files; give only its name in furniture.txt")
            concepts[name] = Concept(name, synonyms, _chain(rest[0], ","), rest[1].split())
        if name not in concepts:
            raise ValueError(f"furniture.txt: {name!r} is no concept yet; give it hypernyms and themes")
        concepts[name].furniture = [word.strip() for word in shown.split(",")]
    return list(concepts.values())
