"""`python -m ivtp.bench suite=cpu`: what pruning saves on the clock, beside what its FLOPs promise; random weights.

suite   cpu: ViT-L/14-336 with a decoder of 1B, minutes on two cores
        gpu: LLaVA-1.5-7B, and LLaVA-NeXT-7B with 2880 visual tokens, bfloat16, under ten minutes on one GPU
        tiny: seconds; whether the bench itself works
model   sizes of configs/model/NAME.yaml in place of the suite's own, as in suite=gpu model=llava_1_5_13b
rounds  of every comparison, alternating (default: the suite's)
json    true: one JSON object instead of tables
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ivtp.command import command
from ivtp.registry import UnknownName, UserError, unknown

KEYS = ("suite", "model", "rounds", "json")


def main(arguments: Sequence[str] | None = None) -> int:
    return command(arguments, lambda: __doc__, _print)


def _print(arguments: list[str]) -> None:
    given = _own(arguments)
    from ivtp.benching.suites import run
    from ivtp.build import quiet_libraries

    quiet_libraries()
    rounds = given["rounds"] and int(given["rounds"])
    record = run(given["suite"], rounds, given["model"], lambda line: print(f"ivtp.bench: {line}", file=sys.stderr))
    if given["json"].lower() == "true":
        print(json.dumps(record))
        return
    from ivtp.benching.report import tables
    from ivtp.cost import as_text

    for table in tables(record):
        print(as_text(table))


def _own(arguments: Sequence[str]) -> dict[str, str | None]:
    given = {"suite": "cpu", "model": None, "rounds": None, "json": "false"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not of the form key=value")
        if key not in KEYS:
            raise UnknownName(unknown("key", key, KEYS))
        given[key] = value
    if given["json"].lower() not in ("true", "false"):
        raise UserError(f"json={given['json']} must be true or false")
    if given["rounds"] is not None and not (given["rounds"].isdigit() and int(given["rounds"])):
        raise UserError(f"rounds={given['rounds']} must be a whole number of at least 1")
    if given["suite"] not in ("cpu", "gpu", "tiny"):
        raise UnknownName(unknown("suite", given["suite"], ["cpu", "gpu", "tiny"]))
    return given


if __name__ == "__main__":
    raise SystemExit(main())
