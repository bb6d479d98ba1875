"""Pruners as options of a config: their names, settings and first sentences.

Those of this package are read from their source, so that `--help`, `--cfg` and shell completion need not import torch;
those of other packages and of plugins come from the registry.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from ivtp.text import first_sentence

FOLDER = Path(__file__).parents[1] / "pruners"
GROUP = "ivtp.pruners"
"""Package of the pruners, and entry point group of those of other packages."""


@dataclass(frozen=True)
class Option:
    """Pruner that can be chosen: its settings with their defaults, those without one, and a sentence about it."""

    name: str
    about: str
    defaults: dict
    required: tuple[str, ...] = ()

    @property
    def settings(self) -> set[str]:
        """Names of all settings."""
        return {*self.defaults, *self.required}

    def config(self) -> dict:
        """Config of the pruner; a setting named `seed` is that of the run."""
        return {"name": self.name} | self.defaults | ({"seed": "${seed}"} if "seed" in self.defaults else {})


@cache
def shipped() -> dict[str, Option]:
    """Pruners of this package by name."""
    found = [option for path in FOLDER.glob("*.py") for option in _in_source(ast.parse(path.read_bytes()))]
    return {option.name: option for option in sorted(found, key=lambda option: option.name)}


def pruners() -> dict[str, Option]:
    """All pruners by name."""
    if GROUP not in sys.modules and not entry_points(group=GROUP):
        return shipped()
    from ivtp.pruners import PRUNERS

    return {name: shipped().get(name) or _of_function(name, PRUNERS[name]) for name in PRUNERS.names()}


def _in_source(tree: ast.Module) -> Iterator[Option]:
    """Functions of a module that `@register_pruner` registers."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(d, ast.Name) and d.id == "register_pruner" for d in node.decorator_list
        ):
            names = [argument.arg for argument in node.args.args]
            values = [ast.literal_eval(value) for value in node.args.defaults]
            bare = len(names) - len(values)
            about = first_sentence(ast.get_docstring(node))
            defaults = dict(zip(names[bare:], values, strict=True))
            yield Option(node.name, about, defaults, tuple(n for n in names[:bare] if n != "shape"))


def _of_function(name: str, function: Callable) -> Option:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "shape"]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    required = tuple(p.name for p in parameters if p.default is p.empty)
    return Option(name, first_sentence(inspect.getdoc(function)), defaults, required)
