"""`python -m ivtp.cost model=llava_1_5_7b pruner=ivtp text=512`: FLOPs in closed form; no weights, no network.

experiment   all rows of an experiment instead of one pruner
text         prompt tokens around the image (512: the paper's count), or several: 128,512
instruction  tokens of the instruction in the CLIP text encoder (default: one context of it)
streamed     true: also count what scores cost when no attention map is formed
convention   paper (default): 2 × MAC of everything, the text and the LM head included; or what others publish:
             macs, two_matrices, one_more (3.82, 5.97, 7.65 T for 7B unpruned, where the paper says 15.4); all: each
json         true: one JSON object instead of a table
All other arguments are those of `ivtp.run`: model, pruner and its settings, budget.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from ivtp.command import command
from ivtp.registry import UnknownName, UserError, unknown

OWN = {"text": [512], "instruction": None, "streamed": False, "convention": "paper", "json": False}
PARTS = ("vision", "projector", "language", "extra", "total")


def main(arguments: Sequence[str] | None = None) -> int:
    return command(arguments, lambda: __doc__, _print)


def _print(arguments: list[str]) -> None:
    own, others = _own(arguments)
    print(report(others, **own))


def _own(arguments: Sequence[str]) -> tuple[dict, list[str]]:
    """This command's own arguments, and the rest."""
    own, others = dict(OWN), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("streamed", "json"):
            if value.lower() not in ("true", "false"):
                raise UserError(f"{key}={value} must be true or false")
            own[key] = value.lower() == "true"
        elif key == "convention":
            own[key] = _convention(value)
        elif key in OWN:
            numbers = value.split(",") if key == "text" else [value]
            if not all(number.isdigit() and int(number) for number in numbers):
                raise UserError(f"{key}={value} must be a whole number of tokens, at least 1")
            own[key] = [int(number) for number in numbers] if key == "text" else int(value)
        else:
            others.append(argument)
    return own, others


def _convention(name: str) -> str:
    from ivtp.pruning.conventions import CONVENTIONS

    if name not in ("paper", "all", *CONVENTIONS):
        raise UnknownName(unknown("convention", name, ["paper", "all", *CONVENTIONS]))
    return name


def report(
    overrides: Sequence[str], text: list[int], instruction: int | None, streamed: bool, convention: str, json: bool
) -> str:
    """The cost of what is configured, as JSON or as tables beside the unpruned model."""
    from ivtp.build import build_shape
    from ivtp.config import load_config, variants

    config = load_config(overrides)
    shape = build_shape(config)
    if not any(override.startswith("experiment=") for override in overrides):
        config.variants = []
    rows = list(variants(config))
    given = dict(override.partition("=")[::2] for override in overrides)
    name = given.get("model.source") or given.get("model") or str(config.model.source)
    found = closed_form(name, rows, shape, text, instruction, streamed)
    if json:
        return _json(found, convention)
    return "\n".join(as_text(t) for t in tables(found, convention))


def closed_form(
    model: str, rows: list[dict], shape, texts: Iterable[int], instruction: int | None, streamed: bool = False
) -> list[dict]:
    """One record per row and text length; of a row with several seeds, which all cost the same, one."""
    from ivtp.build import plan_rows
    from ivtp.pruners.budget import asked
    from ivtp.pruning.conventions import CONVENTIONS
    from ivtp.pruning.cost import cost

    records = []
    for text in texts:
        seen = set()
        for row in plan_rows(rows, shape, text, instruction):
            label = row.seeds_of or row.label
            if label in seen:
                continue
            seen.add(label)
            spent = row.cost if row.stand_in else cost(shape, row.plan, text, instruction, streamed)
            records.append(
                {
                    "model": model,
                    "text": text,
                    "label": label,
                    "section": row.section,
                    "asked": asked(row.budget) if row.pruner["name"] != "none" or row.stand_in else "–",
                    "tokens": list(spent.tokens),
                    "average_tokens": spent.average_tokens,
                    "tflops": spent.tflops(),
                    "conventions": {n: c.count(shape, row.plan) / 1e12 for n, c in CONVENTIONS.items()}
                    if shape.language is not None
                    else {},
                    "paper": row.paper,
                }
            )
    return records


def _json(found: list[dict], convention: str) -> str:
    """Of one pruner what it spends; of an experiment, or several text lengths, a list."""
    spent = [{"tflops": r["tflops"], "tokens": r["tokens"]} for r in found]
    for record, short in zip(found, spent, strict=True):
        if convention != "paper":
            names = record["conventions"] if convention == "all" else [convention]
            short["conventions"] = {name: record["conventions"][name] for name in names}
    if len(found) <= 2 and len({r["text"] for r in found}) == 1:
        return json.dumps(spent[-1])
    return json.dumps([{"label": r["label"], "text": r["text"], **s} for r, s in zip(found, spent, strict=True)])


def tables(found: list[dict], convention: str = "paper") -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, heads, rows): the parts of the cost; for several text lengths, the totals side by side."""
    made = []
    for model in dict.fromkeys(r["model"] for r in found):
        of_model = [r for r in found if r["model"] == model]
        texts = list(dict.fromkeys(r["text"] for r in of_model))
        unit, scale = ("TFLOPs", 1) if max(r["tflops"]["total"] for r in of_model) > 0.1 else ("GFLOPs", 1e3)
        if len(texts) > 1:
            title = f"{model}, {unit} of one prefill by text tokens"
            heads = ["", *map(str, texts)]
            labels = list(dict.fromkeys(r["label"] for r in of_model))
            by = {(r["label"], r["text"]): f"{scale * _total(r, convention):.4g}" for r in of_model}
            made.append((title, heads, [[label, *(by[label, text] for text in texts)] for label in labels]))
            continue
        prompt = f"{texts[0]} text tokens, {unit} of one prefill"
        title = f"{model}, {prompt if of_model[0]['average_tokens'] is not None else f'{unit} of one image'}"
        extra = (
            [] if convention == "paper" else list(of_model[0]["conventions"]) if convention == "all" else [convention]
        )
        papers = any(_printed(r) for r in of_model)
        heads = ["", "asked", "visual tokens", "average", *PARTS, "of unpruned"]
        heads += [*(["the paper's total"] if papers else []), *extra]
        made.append((title, heads, [_line(r, of_model[0], scale, extra, papers) for r in of_model]))
    return made


def _total(record: dict, convention: str) -> float:
    return record["tflops"]["total"] if convention in ("paper", "all") else record["conventions"][convention]


def _line(record: dict, first: dict, scale: float, extra: list[str], papers: bool) -> list[str]:
    average = record["average_tokens"]
    line = [record["label"], record["asked"], " ".join(map(str, record["tokens"]))]
    line += ["–" if average is None else f"{average:.4g}"]
    line += [f"{scale * record['tflops'][part]:.4g}" for part in PARTS]
    line += [f"{100 * record['tflops']['total'] / first['tflops']['total']:.1f} %"]
    if papers:
        line += [_printed(record)]
    return line + [f"{scale * record['conventions'][name]:.4g}" for name in extra]


def _printed(record: dict) -> str:
    """The total that the paper prints for this row, if it is about this model and this much text."""
    from ivtp.report import paper

    identity = record["paper"]
    if identity is None or record["text"] != 512 or paper.table(identity.partition("/")[0])["model"] != record["model"]:
        return ""
    return f"{paper.row(identity)['tflops']:g}"


def as_text(table: tuple[str, list[str], list[list[str]]]) -> str:
    from rich.table import Table

    from ivtp.console import PlainConsole

    title, heads, lines = table
    shown = Table(title=title)
    for i, head in enumerate(heads):
        shown.add_column(head, justify="left" if i == 0 else "right", overflow="fold", max_width=36)
    for line in lines:
        shown.add_row(*line)
    console = PlainConsole()
    if not console.is_terminal:
        console = PlainConsole(width=console.measure(shown, options=console.options.update(width=1000)).maximum)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
