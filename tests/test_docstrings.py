"""First lines of docstrings are imperatives or noun phrases; ruff (D1xx, D4xx in pyproject.toml) checks that they exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ivtp"
SHELVES = sorted({path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py")})

HEADLESS = re.compile(
    r"(What|How|Those|Whether|Who|Whose|Where|Which|That|When|Why|If|Because|So that|Of|As|For|To|From|In|Within|Beside|"
    r"Behind|Nobody|Everybody|Somebody|It|They|We|I|There)\b"
)
"""Clauses without a subject, fragments that begin with a preposition, and persons."""
THIRD_PERSON = re.compile(
    r"(Adds|Carries|Checks|Decides|Does|Gives|Has|Holds|Is|Keeps|Makes|Raises|Reads|Returns|Says|Sets|Sorts|Takes|Tells|"
    r"Watches|Wraps|Yields)\b"
)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring in a module, of its constants and fields too."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not body:
            continue
        first, *rest = body
        pairs = [(None, first), *zip(body, rest, strict=False)]
        for before, statement in pairs:
            if before is not None and not isinstance(before, (ast.Assign, ast.AnnAssign)):
                continue
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, text.strip()


def headless(text: str) -> bool:
    return bool(HEADLESS.match(text) or THIRD_PERSON.match(text))


@pytest.mark.parametrize("shelf", SHELVES)
def test_no_docstring_is_headless(shelf):
    path = ROOT / shelf
    found = [
        f"{file.relative_to(ROOT.parent)}:{line}: {text.splitlines()[0]}"
        for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))
        for line, text in docstrings(ast.parse(file.read_text(encoding="utf-8")))
        if headless(text)
    ]
    assert not found, f"{len(found)} docstrings begin without a noun or an imperative:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What stands for the whole of every crop.", True),
        ("How far a row is: a bar in a terminal.", True),
        ("Those that answer in words.", True),
        ("Whether an error is about a sample.", True),
        ("As of the product that it is.", True),
        ("of every image of a prompt".capitalize(), True),
        ("Nobody looks at padding.", True),
        ("Sorts every image under a plan.", True),
        ("Progress of one row: a bar in a terminal, otherwise a line every 30 s.", False),
        ("Prune a model inside a context.", False),
        ("Wrap an image transform as a transformers image processor.", False),
        ("Global feature of each crop, in projector-input space.", False),
        ("Howl", False),
    ],
)
def test_the_rule_tells_both_kinds_apart(text, expected):
    assert headless(text) is expected


def test_constants_and_fields_are_read_too():
    tree = ast.parse('"""A."""\nX = 1\n"""B."""\nclass C:\n    """D."""\n    y: int = 2\n    """E."""\n    z = "F"\n')
    assert [text for _, text in docstrings(tree)] == ["A.", "B.", "D.", "E."]
