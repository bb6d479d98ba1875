"""From what a user may spend to how many tokens a method keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ivtp.pruning.cost import Shape
from ivtp.registry import UnknownName, UserError, unknown

KINDS = ("keep", "tflops", "like", "ratio")


def solve(
    budget: Mapping, shape: Shape, flops: Callable[[int], int], rows: Mapping[str, int] | None = None
) -> int:
    """How many visual tokens stay at the end.

    budget  keep: tokens; tflops: per image; like: the cost of that row; else ratio: the share of the tokens
    flops   the cost of the method at a given number of tokens; raises ValueError where the method cannot do it
    rows    cost of the rows that "like" may name
    """
    kind, value = chosen(budget)
    if kind == "like":
        if value not in (rows or {}):
            raise UnknownName(unknown("row to take the budget from", str(value), rows or {}))
        return _nearest(rows[value], shape, flops, f"the cost of row {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"budget.{kind}={value!r} is not a number")
    if kind == "keep":
        return value
    if kind == "ratio":
        if not 0 < value <= 1:
            raise UserError(f"budget.ratio={value} must be above 0 and at most 1: the share of visual tokens that stays")
        return max(1, round(value * shape.patches))
    return _nearest(value * 1e12, shape, flops, f"budget.tflops={value}")


def chosen(budget: Mapping) -> tuple[str, object]:
    """The one kind of budget that is given; `ratio` only counts where no other is."""
    if set(budget) - set(KINDS):
        raise UnknownName(unknown("budget", str(next(iter(set(budget) - set(KINDS)))), KINDS))
    given = [kind for kind in KINDS if budget.get(kind) is not None and kind != "ratio"]
    if len(given) > 1:
        raise UserError(f"budget.{given[0]} and budget.{given[1]} are both given; choose one")
    kind = given[0] if given else "ratio"
    if budget.get(kind) is None:
        raise UserError(f"no budget is given; set one of {', '.join('budget.' + kind for kind in KINDS)}")
    return kind, budget[kind]


def _nearest(target: float, shape: Shape, flops: Callable[[int], int], asked: str) -> int:
    costs = {}
    for keep in range(1, shape.patches + 1):
        try:
            costs[keep] = flops(keep)
        except ValueError:
            continue  # a number of tokens that this method cannot meet
    if not costs:
        raise UserError(f"{asked}: the method can keep no number of tokens between 1 and {shape.patches}")
    low, high = min(costs.values()), max(costs.values())
    if not low * 0.999 <= target <= high * 1.001:
        raise UserError(
            f"{asked} is {target / 1e12:.6g} TFLOPs, but this method spends between {low / 1e12:.6g} (1 token) and "
            f"{high / 1e12:.6g} (all {shape.patches}); choose a budget in between"
        )
    return min(costs, key=lambda keep: abs(costs[keep] - target))
