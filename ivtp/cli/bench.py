"""`python -m ivtp.bench`: latency and throughput with random weights, beside the speed-up that FLOPs promise."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import getdoc

from ivtp.cli.arguments import choice, parse
from ivtp.cli.command import command
from ivtp.registry import UserError


@dataclass(frozen=True)
class Arguments:
    """`python -m ivtp.bench suite=cpu`: speed-up by pruning, beside the one that FLOPs promise; random weights.

    suite   cpu: ViT-L/14-336 with a decoder of 1B, minutes on two cores
            gpu: LLaVA-1.5-7B, and LLaVA-NeXT-7B with 2880 visual tokens, bfloat16, minutes on one GPU
            tiny: seconds, to test the benchmark itself
            lead: all pruners on a small LLaVA at 64 and 192 tokens, batch 1 and 8, time and peak memory
            pipeline: the loop of a run over its model alone, with 0, 1, 2 and 4 workers, minutes
    model   sizes of configs/model/NAME.yaml in place of the suite's own, as in suite=gpu model=llava_1_5_13b
    rounds  of every comparison, alternating (default: the suite's)
    pruners, keep, batch  of suite=lead in place of its own: pruners=fastv,divprune keep=64 batch=1,8
    against  another checkout of ivtp, which suite=lead times in the same alternation: against=PATH
    json    true: one JSON object instead of tables
    """

    suite: str = choice("cpu", lambda: ("cpu", "gpu", "tiny", "pipeline", "lead"))
    model: str | None = None
    rounds: int | None = None
    pruners: str | None = None
    keep: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    against: str | None = None
    json: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return command(arguments, lambda: getdoc(Arguments) or "", _print)


def _print(arguments: list[str]) -> None:
    options = parse(Arguments, arguments)
    from ivtp.experiment.planning import quiet_libraries

    quiet_libraries()
    record = _record(options)
    if options.json:
        print(json.dumps(record))
        return
    from ivtp.report.console import as_text
    from ivtp.timing.report import tables

    for table in tables(record):
        print(as_text(table))


def _record(options: Arguments) -> dict:
    def say(line: str) -> None:
        print(f"ivtp.bench: {line}", file=sys.stderr)

    own = {name: getattr(options, name) for name in ("pruners", "keep", "batch", "against")}
    own = {name: value for name, value in own.items() if value}
    if options.suite == "lead":
        from ivtp.timing import lead

        if options.model:
            raise UserError(f"model={options.model}: suite=lead has one model; leave it out")
        if options.rounds:
            own["rounds"] = options.rounds
        if options.pruners:
            own["pruners"] = tuple(options.pruners.split(","))
        return lead.run(lead.Lead(**own), say)
    if own:
        raise UserError(f"{', '.join(own)}: of suite=lead alone; leave it out, or choose that suite")
    from ivtp.timing.suites import run

    return run(options.suite, options.rounds, options.model, say)
