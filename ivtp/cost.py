"""`python -m ivtp.cost model=llava_1_5_7b pruner=ivtp text=512`: FLOPs in closed form; no weights, no network.

text         prompt tokens around the image (512: the paper's count)
instruction  tokens of the instruction in the CLIP text encoder (default: one context of it)
streamed     true: also count what scores cost when no attention map is formed
json         true: one JSON object instead of a table
All other arguments are those of `ivtp.run`: model, pruner and its settings, budget.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ivtp.registry import UserError

OWN = {"text": 512, "instruction": None, "streamed": False, "json": False}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__.strip())
        return 0
    try:
        own, others = _own(arguments)
        print(report(others, **own))
    except UserError as error:
        print(f"ivtp: {error}", file=sys.stderr)
        return 2
    return 0


def _own(arguments: Sequence[str]) -> tuple[dict, list[str]]:
    """This command's own arguments, and the rest."""
    own, others = dict(OWN), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("streamed", "json"):
            if value.lower() not in ("true", "false"):
                raise UserError(f"{key}={value} must be true or false")
            own[key] = value.lower() == "true"
        elif key in OWN:
            if not value.isdigit() or int(value) < 1:
                raise UserError(f"{key}={value} must be a whole number of tokens, at least 1")
            own[key] = int(value)
        else:
            others.append(argument)
    return own, others


def report(overrides: Sequence[str], text: int, instruction: int | None, streamed: bool, json: bool) -> str:
    """The cost of the configured pruner on the configured model, as JSON or as a table beside the unpruned model."""
    from ivtp.build import build_shape, plan_rows
    from ivtp.config import load_config, variants
    from ivtp.pruning.cost import cost

    config = load_config(overrides)
    shape = build_shape(config)
    config.variants = []
    rows = plan_rows(list(variants(config)), shape, text, instruction)
    costs = {row.label: cost(shape, row.plan, text, instruction, streamed) for row in rows}
    spent = costs[rows[-1].label]
    if json:
        return _json(spent)
    return _table(str(config.model.source), text, costs)


def _json(spent) -> str:
    return json.dumps({"tflops": spent.tflops(), "tokens": list(spent.tokens)})


def _table(model: str, text: int, costs: dict) -> str:
    from rich.console import Console
    from rich.table import Table

    unit, scale = ("TFLOPs", 1) if max(spent.total for spent in costs.values()) > 1e11 else ("GFLOPs", 1e3)
    table = Table(title=f"{model}, {text} text tokens, {unit} of one prefill")
    parts = ("vision", "projector", "language", "extra", "total")
    for head in ("", *parts, "visual tokens"):
        table.add_column(head, justify="right", overflow="fold")
    for label, spent in costs.items():
        numbers = [f"{scale * spent.tflops()[part]:.4g}" for part in parts]
        table.add_row(label, *numbers, " ".join(map(str, spent.tokens)))
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
