"""Text of `python -m ivtp.run --help`: options of the groups, and all keys with their texts."""

from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path

from ivtp.experiment import catalogue, schema
from ivtp.experiment.config import GROUPS, options
from ivtp.experiment.schema import as_written
from ivtp.text import first_sentence


def listing(folders: Sequence[Path]) -> str:
    """Options of every group, those of a user's own folders included, and keys of each dataclass."""
    lines = []
    for group in GROUPS:
        some = options(group, folders) or {"…": "of your own: DIR/{group}/NAME.yaml".replace("{group}", group)}
        lines += [f"{group}=", *(f"  {name:20} {about}" for name, about in some.items()), ""]
    settings = [option for option in catalogue.pruners().values() if option.settings]
    lines += ["Settings of the pruners, beside budget (pruner.tau=0.3):"]
    for option in settings:
        values = [f"{name}={as_written(value)}" for name, value in option.defaults.items()]
        values += [name for name in option.required if name != "keep"]
        lines += [f"  {option.name:20} {', '.join(values)}"] if values else []
    lines += ["", "Keys:", *keys(schema.keys_of(schema.Run))]
    for path, kind in schema.OPTIONS.items():
        group, _, name = path.partition("/")
        lines += ["", f"Keys of {group}={name.removeprefix('base/')}: {first_sentence(kind.__doc__)}"]
        lines += keys(schema.keys_of(kind, f"{group}."))
    return "\n".join(lines)


def keys(some: Iterable[schema.Key]) -> list[str]:
    """Line for each key: its default, its text, and what it may be."""
    return [
        f"  {k.name}={as_written(k.default)}  {k.about}{bounds(k)}"
        for k in some
        if k.about and not is_dataclass(k.kinds[0])
    ]


def bounds(key: schema.Key) -> str:
    """Choices and bound of a key, in brackets."""
    words = [as_written(choice) for choice in key.choices] or (["false", "true"] if bool in key.kinds else [])
    if key.least is not None:
        words.insert(0, f"at least {key.least}")
    if words and key.nullable and "null" not in words:
        words.append("null")
    return f" [{' | '.join(words)}]" if words else ""
