"""Rows of several seeds drawn together, and what the paper claims held against our own rows."""

from __future__ import annotations

from ivtp.evaluation.statistics import compare, over_seeds, spread


def together(rows: list[dict], outcomes: dict[str, list[dict]]) -> tuple[list[dict], dict[str, list[dict]]]:
    """One row and its outcomes in place of all the seeds of a row; rows that have none are left as they are."""
    members: dict[str, list[dict]] = {}
    for row in rows:
        members.setdefault(row.get("seeds_of") or row["label"], []).append(row)
    merged = []
    for label, group in members.items():
        if group[0].get("seeds_of") is None:
            merged.append(group[0])
            continue
        rates = [row["speed"]["questions_per_second"] for row in group if row["speed"]["questions_per_second"]]
        speed = group[0]["speed"] | {"questions_per_second": sum(rates) / len(rates) if rates else None}
        metrics = spread([row["metrics"] for row in group])
        series, lost = group[0].get("series", label), [row["failed"]["n"] for row in group if row.get("failed")]
        about = {"label": label, "series": series, "metrics": metrics, "speed": speed, "seeds": len(group)}
        merged.append(group[0] | about | ({"failed": {"n": sum(lost)}} if lost else {}))
    found = {}
    for row in merged:
        group = members[row["label"]]
        runs = [outcomes[member["label"]] for member in group]
        found[row["label"]] = over_seeds(runs) if group[0].get("seeds_of") else runs[0]
    return merged, found


def verdict(comparison: dict) -> str:
    """Whether a claim of a positive difference holds: "yes", "no", or "not significant" where the interval covers zero."""
    low, high = comparison["interval"]
    if low is None or low != low or low <= 0 <= high:
        return "not significant"
    return "yes" if low > 0 else "no"


def judge(claims: list[dict], outcomes: dict[str, list[dict]], experiment: str) -> list[dict]:
    """Every claim with our difference on the same questions, its interval, and whether that agrees."""
    judged = []
    for claim in claims:
        better, worse = claim["rows"]
        found = compare(outcomes[better], outcomes[worse])
        judged.append(
            {
                "experiment": experiment,
                "claim": claim["claim"],
                "rows": claim["rows"],
                "paper": claim.get("paper"),
                "difference": found["difference"],
                "interval": found["interval"],
                "p": found["p"],
                "n": found["n"],
                "agrees": verdict(found),
            }
        )
    return judged


def interval(comparison: dict) -> str:
    """ "+2.1 [+0.4, +3.9]", in points."""
    low, high = comparison["interval"]
    between = "" if low is None or low != low else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * comparison['difference']:+.1f}{between}"


HEADS = ["claim", "the paper's effect", "ours", "n", "agrees?"]


def lines(judged: list[dict]) -> list[list[str]]:
    paper = ["not printed" if claim["paper"] is None else f"{claim['paper']:+.1f}" for claim in judged]
    ours = [interval(claim) if claim["n"] else "–" for claim in judged]
    return [[c["claim"], p, o, str(c["n"]), c["agrees"]] for c, p, o in zip(judged, paper, ours, strict=True)]
