"""Merged results of several seeds, and claims of the paper tested on our own rows."""

from dataclasses import replace

from ivtp.data.outcomes import Outcome
from ivtp.evaluation.statistics import compare, over_seeds, spread
from ivtp.report.tables import Column, Table, interval, make_table
from ivtp.results import Result


def together(
    results: list[Result], outcomes: dict[str, list[Outcome]]
) -> tuple[list[Result], dict[str, list[Outcome]]]:
    """Replace all seeds of a row by one result and its outcomes; rows without seeds stay as they are."""
    members: dict[str, list[Result]] = {}
    for result in results:
        members.setdefault(result.seeds_of or result.label, []).append(result)
    merged = [_merged(label, seeds) if seeds[0].seeds_of else seeds[0] for label, seeds in members.items()]
    runs = {
        label: over_seeds([outcomes[seed.label] for seed in seeds]) if seeds[0].seeds_of else outcomes[label]
        for label, seeds in members.items()
    }
    return merged, runs


def _merged(label: str, seeds: list[Result]) -> Result:
    """Merge several seeds: mean metrics, their spread, mean rate, and the failures of all."""
    rates = [rate for seed in seeds if (rate := seed.speed["questions_per_second"])]
    speed = seeds[0].speed | {"questions_per_second": sum(rates) / len(rates) if rates else None}
    failed = [seed.failed["n"] for seed in seeds if seed.failed]
    return replace(
        seeds[0],
        label=label,
        series=seeds[0].series or label,
        metrics=spread([seed.metrics for seed in seeds]),
        speed=speed,
        seeds=len(seeds),
        failed={"n": sum(failed)} if failed else None,
    )


def verdict(comparison: dict) -> str:
    """Verdict on a claim of a positive difference: "yes", "no", or "not significant" if the interval covers zero."""
    low, high = comparison["interval"]
    if low is None or low != low or low <= 0 <= high:
        return "not significant"
    return "yes" if low > 0 else "no"


def verdicts_on(claims: list[dict], outcomes: dict[str, list[Outcome]], experiment: str) -> list[dict]:
    """Test every claim: our difference on the same questions, its interval, and the verdict."""
    verdicts = []
    for claim in claims:
        better, worse = claim["rows"]
        comparison = compare(outcomes[better], outcomes[worse])
        verdicts.append(
            {"experiment": experiment, "claim": claim["claim"], "rows": claim["rows"], "paper": claim.get("paper")}
            | {name: comparison[name] for name in ("difference", "interval", "p", "n")}
            | {"agrees": verdict(comparison)}
        )
    return verdicts


COLUMNS = [
    Column("claim", lambda claim: claim["claim"]),
    Column("the paper's effect", lambda claim: "not printed" if claim["paper"] is None else f"{claim['paper']:+.1f}"),
    Column("ours", lambda claim: claim if claim["n"] else None, interval),
    Column("n", lambda claim: claim["n"]),
    Column("agrees?", lambda claim: claim["agrees"]),
]


def table(verdicts: list[dict]) -> Table:
    """Table of the paper's claims beside our effect."""
    return make_table("Claims of the paper", COLUMNS, verdicts, "Differences in points, 95 % bootstrap interval.")
