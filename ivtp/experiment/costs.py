"""Closed-form FLOPs of the rows of an experiment."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ivtp import results as store
from ivtp.core.conventions import CONVENTIONS
from ivtp.core.flops import COUNTED, Shape, cost
from ivtp.experiment.config import load_config
from ivtp.experiment.planning import build_shape, plan_rows
from ivtp.pruners.budget import in_words
from ivtp.registry import UserError
from ivtp.report.console import as_text
from ivtp.report.costs import tables
from ivtp.report.tables import UNKNOWN, markdown


def closed_form(
    model: str,
    rows: list[dict],
    shape: Shape,
    texts: Iterable[int],
    instruction: int | None,
    streamed: bool = False,
    convention: str = "paper",
) -> list[dict]:
    """Cost per row and text length; once for a row with several seeds, which all cost the same.

    convention  of `ivtp.core.flops.cost`: "paper", as budgets and tables count, or "run"
    """
    costs = {}
    for text in texts:
        for row in plan_rows(rows, shape, text, instruction):
            label = row.seeds_of or row.label
            if (label, text) in costs:
                continue
            counted = {name: cost(shape, row.plan, text, instruction, streamed, name) for name in COUNTED}
            if row.stand_in:
                counted = {name: replace(row.cost, vision=spent.vision) for name, spent in counted.items()}
            spent, others = counted[convention], CONVENTIONS if shape.language is not None else {}
            costs[label, text] = {
                "model": model,
                "text": text,
                "label": label,
                "section": row.section,
                "budget": in_words(row.budget) if row.pruner["name"] != "none" or row.stand_in else UNKNOWN,
                "tokens": list(spent.tokens),
                "average_tokens": spent.average_tokens,
                "tflops": spent.tflops(),
                "conventions": {"paper": counted["paper"].total / 1e12}
                | {name: other.count(shape, row.plan) / 1e12 for name, other in others.items()},
                "paper": row.paper,
            }
    return list(costs.values())


def write_costs(config, rows: list[dict], folder: Path, console) -> None:
    """Write the cost of the rows on the models of `costs`, from their configs alone, to costs.jsonl.

    Without an evaluation, also print it and write table.md.
    """
    costs = []
    for name in (config.costs.models or []) if config.variants else []:
        shape = build_shape(load_config([f"model={name}"]))
        try:
            costs += closed_form(name, rows, shape, config.costs.text, None)
        except UserError as error:  # a budget that only fits the model that runs
            console.print(f"no cost of {name}: {error}", soft_wrap=True)
    store.replace(folder / "costs.jsonl", store.lines(store.with_schema(costs)))
    if not config.evaluate:
        drawn = tables(costs)
        for table in drawn:
            print(as_text(table))
        text = f"# {config.name}\n" + "".join(f"\n{markdown(table)}" for table in drawn)
        store.replace(folder / "table.md", text.encode(errors="backslashreplace"))
