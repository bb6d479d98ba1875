"""`python -m ivtp.cost`: FLOPs in closed form; no weights, no network."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import getdoc

from ivtp.cli.arguments import choice, parse_known
from ivtp.cli.command import command
from ivtp.registry import UserError


def _conventions() -> list[str]:
    from ivtp.core.conventions import CONVENTIONS

    return ["run", "paper", "all", *CONVENTIONS]


@dataclass(frozen=True)
class Arguments:
    """`python -m ivtp.cost model=llava_1_5_7b pruner=ivtp text=512`: FLOPs in closed form; no weights, no network.

    experiment   all rows of an experiment instead of one pruner
    text         prompt tokens around the image (512: the paper's count), or several: 128,512
    instruction  tokens of the instruction in the CLIP text encoder (default: one context of it)
    streamed     true: also count what scores cost when no attention map is formed
    convention   run (default): 2 × MAC of everything that is run, the text and the LM head included; paper: with all layers
                 of the tower (15.404 T for 7B unpruned), as the paper, budgets and tables of runs count; or what others
                 publish: macs, two_matrices, one_more (3.82, 5.97, 7.65 T); all: each
    json         true: one JSON object instead of a table
    All other arguments are those of `ivtp.run`: model, pruner and its settings, budget, plugins, --config-dir DIR.
    """

    text: tuple[int, ...] = (512,)
    instruction: int | None = None
    streamed: bool = False
    convention: str = choice("run", _conventions)
    json: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return command(
        arguments, lambda: getdoc(Arguments) or "", lambda words: print(report(*parse_known(Arguments, words)))
    )


def report(options: Arguments, overrides: Sequence[str]) -> str:
    """Cost of a configuration, as JSON or as tables beside the unpruned model."""
    from ivtp.cli.application import read
    from ivtp.experiment.config import load_config
    from ivtp.experiment.costs import closed_form
    from ivtp.experiment.planning import build_shape
    from ivtp.experiment.variants import variants
    from ivtp.report.console import as_text
    from ivtp.report.costs import tables

    request, flags = read(overrides)
    if (flags and request.config_dir is None) or len(flags) > 2:
        raise UserError(f"{' '.join(flags)}: of the flags of ivtp.run this command reads --config-dir DIR alone")
    overrides = request.overrides
    config = load_config(overrides, [request.config_dir] if request.config_dir else [])
    shape = build_shape(config)
    if not any(override.startswith("experiment=") for override in overrides):
        config.variants = []
    rows = list(variants(config))
    values = {override.partition("=")[0]: override.partition("=")[2] for override in overrides}
    name = values.get("model.source") or values.get("model") or str(config.model.source)
    counted = "paper" if options.convention == "paper" else "run"
    costs = closed_form(name, rows, shape, options.text, options.instruction, options.streamed, counted)
    if options.json:
        return _json(costs, options.convention)
    return "\n".join(as_text(t) for t in tables(costs, options.convention))


def _json(costs: list[dict], convention: str) -> str:
    """Cost of one pruner as an object; of an experiment, or several text lengths, as a list."""
    shorts = [{"tflops": r["tflops"], "tokens": r["tokens"]} for r in costs]
    for record, short in zip(costs, shorts, strict=True):
        if convention not in ("run", "paper"):
            names = record["conventions"] if convention == "all" else [convention]
            short["conventions"] = {name: record["conventions"][name] for name in names}
    if len(costs) <= 2 and len({r["text"] for r in costs}) == 1:
        return json.dumps(shorts[-1])
    return json.dumps([{"label": r["label"], "text": r["text"], **s} for r, s in zip(costs, shorts, strict=True)])
