"""Budgets: from tokens, ratios, FLOPs or the cost of another row to the number of tokens that a pruner keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from fractions import Fraction
from math import isqrt
from typing import Any

from ivtp.core.flops import Cost, Shape
from ivtp.registry import UnknownName, UserError, unknown

KINDS = ("keep", "tflops", "average_tokens", "like", "ratio")
PER = "per"
"""Key beside the kind: `keep` counts the tokens of an image, or of each of its crops."""


def solve(budget: Mapping, shape: Shape, spend: Callable[[int], Cost], rows: Mapping[str, Cost] | None = None) -> int:
    """Visual tokens that stay at the end.

    budget  keep: tokens; tflops: per image; average_tokens: visual tokens in a language layer, mean over the layers;
            like: the FLOPs of that row; else ratio: the share of the tokens (a number, or "1/9")
    spend   the cost of the method at a given number of tokens; raises ValueError where the method cannot do it
    rows    cost of the rows that "like" may name
    """
    (kind, value), rows = chosen(budget), rows or {}
    if budget.get(PER, "image") != "image" and kind != "keep":
        raise UserError(
            f"budget.per={budget[PER]} goes with budget.keep; a share or a cost is of the whole image anyway"
        )
    if kind == "like":
        if value not in rows:
            raise UnknownName(unknown("row to take the budget from", str(value), rows))
        return _nearest(rows[value].total, shape, lambda k: spend(k).total, f"the cost of row {value!r}", "TFLOPs")
    if kind == "ratio":
        return max(shape.crops, round(share(value) * shape.tokens))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"budget.{kind}={value!r} is not a number")
    if kind == "keep":
        if not isinstance(value, int):
            raise UserError(
                f"budget.keep={value} must be a whole number of visual tokens between {shape.crops} and {shape.tokens}"
            )
        return value
    if kind == "average_tokens":
        if shape.language is None:
            raise UserError(f"budget.average_tokens={value} counts tokens in a language model, but this model has none")
        return _nearest(value, shape, lambda k: spend(k).average_tokens, f"budget.average_tokens={value}", "tokens")
    return _nearest(value * 1e12, shape, lambda k: spend(k).total, f"budget.tflops={value}", "TFLOPs")


def share(value: object, name: str = "budget.ratio") -> float:
    """The share of visual tokens that stays, from 0.111 or "1/9"; raises UserError, naming the key, outside (0, 1].

    >>> share("1/4"), share(0.25)
    (0.25, 0.25)
    """
    try:
        number = float(Fraction(str(value)))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{name}={value!r} is not a number") from error
    if not 0 < number <= 1:
        raise UserError(f"{name}={value} must be above 0 and at most 1: the share of visual tokens that stays")
    return number


def chosen(budget: Mapping) -> tuple[str, Any]:
    """The one kind of budget that is given, and its value; `ratio` only counts where no other is."""
    for name in budget:
        if name not in (*KINDS, PER):
            raise UnknownName(unknown("budget", str(name), [*KINDS, PER]))
    given = [kind for kind in KINDS if budget.get(kind) is not None and kind != "ratio"]
    if len(given) > 1:
        raise UserError(f"budget.{given[0]} and budget.{given[1]} are both given; choose one")
    kind = given[0] if given else "ratio"
    if budget.get(kind) is None:
        raise UserError(f"no budget is given; set one of {', '.join('budget.' + kind for kind in KINDS)}")
    return kind, budget[kind]


def in_words(budget: Mapping) -> str:
    """The budget in words, for tables."""
    kind, value = chosen(budget)
    if kind == "ratio":
        return f"{value} of the tokens" if isinstance(value, str) else f"{100 * value:.3g} % of the tokens"
    return {
        "keep": f"{value} tokens" + (" of each crop" if budget.get(PER) == "crop" else ""),
        "tflops": f"{value} TFLOPs",
        "average_tokens": f"{value} tokens on average",
        "like": f"as {value}",
    }[kind]


def _nearest(target: float, shape: Shape, measure: Callable[[int], Any], what: str, unit: str) -> int:
    spent: dict[int, float] = {}

    def try_all(counts: Iterable[int]) -> None:
        for keep in set(counts) - set(spent):
            with suppress(ValueError):  # a number of tokens that this method cannot meet
                spent[keep] = measure(keep)

    # Cost grows with the tokens up to rounding: a coarse look, then everything near the best and at the lower end.
    step = max(1, isqrt(shape.tokens))
    coarse = [*range(1, shape.tokens, step), shape.tokens]
    try_all(coarse)
    if 2 * len(spent) < len(coarse):  # a method that can keep few numbers of tokens, such as grids: ask for each
        try_all(range(1, shape.tokens + 1))
    elif spent:
        best = min(spent, key=lambda keep: abs(spent[keep] - target))
        for place in (min(spent), best):
            try_all(range(max(1, place - step), min(shape.tokens, place + step) + 1))
    if not spent:
        raise UserError(f"{what}: the method can keep no number of tokens between 1 and {shape.tokens}")
    scale = 1e12 if unit == "TFLOPs" else 1
    low, high = min(spent.values()), max(spent.values())
    if not low * 0.999 <= target <= high * 1.001:
        raise UserError(
            f"{what} is {target / scale:.6g} {unit}, but this method spends between {low / scale:.6g} ({min(spent)} token"
            f"{'s' * (min(spent) > 1)}) and {high / scale:.6g} (all {max(spent)}); choose a budget in between"
        )
    return min(spent, key=lambda keep: abs(spent[keep] - target))
