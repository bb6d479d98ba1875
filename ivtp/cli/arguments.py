"""Arguments of a command, of the form key=value, as a dataclass: annotations are types, metadata are choices."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, fields
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from ivtp.registry import UnknownName, UserError, unknown


class Dataclass(Protocol):
    """An instance of any dataclass, for type checkers."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=Dataclass)


def choice(default: str, choices: Callable[[], Iterable[str]]) -> Any:
    """Field with a fixed set of values, which are listed only on use."""
    return field(default=default, metadata={"choices": choices})


def parse(kind: type[T], arguments: Sequence[str]) -> T:
    """Read the arguments of a command; raises UserError in one line for one that cannot be used."""
    values, rest = parse_known(kind, arguments)
    for argument in rest:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not of the form key=value")
        raise UnknownName(unknown("key", key, [f.name for f in fields(kind)]))
    return values


def parse_known(kind: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Read the arguments that a command has a field for; return the others unchanged."""
    hints = get_type_hints(kind)
    choices = {f.name: f.metadata["choices"] for f in fields(kind) if "choices" in f.metadata}
    values, rest = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in hints:
            rest.append(argument)
        elif key in choices and value not in (known := list(choices[key]())):
            raise UnknownName(unknown(key, value, known))
        else:
            values[key] = _convert(key, value, hints[key])
    return kind(**values), rest


def _convert(key: str, value: str, hint: Any) -> object:
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise UserError(f"{key}={value} must be true or false")
        return value.lower() == "true"
    if int in (hint, *get_args(hint)):  # int, int | None, tuple[int, ...]
        several = get_origin(hint) is tuple
        numbers = value.split(",") if several else [value]
        if not all(number.isdigit() and int(number) for number in numbers):
            raise UserError(f"{key}={value} must be a whole number of at least 1")
        return tuple(map(int, numbers)) if several else int(value)
    return value
