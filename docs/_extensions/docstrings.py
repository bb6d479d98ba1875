"""Turn the package's docstrings into reStructuredText.

They are written to be read in a terminal: single backticks are code, and a block of lines `name   description` describes
parameters, fields, or the choices of a method.
"""

import inspect
import re
from collections.abc import Callable, Iterable

ITEM = re.compile(r"(\w[\w.]*(?:,? \w+)?)\s{2,}(\S.*)")
ARXIV = re.compile(r"(?:arXiv )?\b(\d{4}\.\d{5})\b")
DOI = re.compile(r"\b10\.\d{4}/[\w.-]+\w")


def inline(text: str) -> str:
    """One line of a docstring with its links; signs that mean something in reStructuredText are escaped."""
    parts = re.split(r"(`[^`]*`)", text)
    for place in range(0, len(parts), 2):
        escaped = re.sub(r"([*|@\\]|_\b|_(?=\W|$))", r"\\\1", parts[place])
        escaped = re.sub(r"10\.\d{4}/\S+", lambda found: found.group().replace("\\", ""), escaped)
        escaped = DOI.sub(r"`\g<0> <https://doi.org/\g<0>>`__", escaped)
        parts[place] = ARXIV.sub(r"`arXiv \1 <https://arxiv.org/abs/\1>`__", escaped)
    return "".join(parts)


def translate(lines: Iterable[str], field: Callable[[str], str | None]) -> list[str]:
    """The lines of a docstring as reStructuredText; `field` names the field of an item, None: a definition."""
    result: list[str] = []
    in_items = in_code = False
    for line in lines:
        item = ITEM.fullmatch(line)
        begins = line.startswith((">>>", "    ")) and not in_items
        in_code = bool(line.strip()) and (begins or in_code)
        if in_code:
            result.append(line)
        elif item:
            if not in_items and result and result[-1]:
                result.append("")
            in_items, name = True, field(item[1])
            head = [f":{name}: {inline(item[2])}"] if name else [f"``{item[1]}``", f"    {inline(item[2])}"]
            result += head
        elif in_items and line.startswith("  "):
            result.append(f"    {inline(line.strip())}")
        else:
            if in_items and line.strip():
                result.append("")
            in_items = False
            result.append(inline(line))
    return result


def field_of(obj: object) -> Callable[[str], str | None]:
    """Parameters of `obj` become parameter fields; capitalised names (Scores, Selects, …) fields of their own."""
    try:
        parameters = set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):  # modules, properties
        parameters = set()

    def field(name: str) -> str | None:
        if name in parameters:
            return f"param {name}"
        return name if name[0].isupper() and not parameters.isdisjoint({"shape"}) else None

    return field


def process(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = translate(lines, field_of(obj))


def setup(app) -> dict:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
