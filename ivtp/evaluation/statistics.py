"""Accuracy with standard errors, and paired comparisons on the same samples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest


def mean_error(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """Mean and its standard error, where values of one cluster (questions about one image) are not independent."""
    groups = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        groups[cluster].append(value)
    n, m = len(values), len(groups)
    if n == 0:
        return math.nan, math.nan
    mean = float(np.mean(values))
    if m < 2:
        return mean, math.nan
    residuals = np.array([sum(group) - mean * len(group) for group in groups.values()])
    return mean, float(math.sqrt(m / (m - 1) * np.square(residuals).sum()) / n)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Exact two-sided McNemar p for two methods on the same samples; only samples where they differ count."""
    gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost).pvalue)


LEVEL, RESAMPLES = 0.95, 2000
BLOCK = 1 << 22
"""Entries of the table of resampled clusters in memory at a time."""


def bootstrap(values: Sequence[float], clusters: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean, whole clusters (images with all their questions) resampled with replacement.

    A resample is a count per cluster; fewer than two clusters give NaN. The same seed gives the same interval.
    """
    _, cluster = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    count = np.bincount(cluster) if len(cluster) else np.zeros(0)
    m = len(count)
    if m < 2:
        return math.nan, math.nan
    total = np.bincount(cluster, weights=np.asarray(values, dtype=float))
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(1, BLOCK // m)
    for start in range(0, RESAMPLES, step):
        drawn = rng.multinomial(m, np.full(m, 1 / m), size=min(step, RESAMPLES - start))
        means[start : start + step] = (drawn @ total) / (drawn @ count)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def summary(outcomes: Sequence[dict]) -> dict:
    """Metrics of one row: {name: {"mean", "se", "n"}}.

    Accuracies are given over all questions, per family, and per level of difficulty ("difficulty/size: small").
    """
    images = [o["image"] for o in outcomes]

    def metric(key: str, rows: Sequence[dict] = outcomes) -> dict:
        rows = [row for row in rows if row[key] is not None]
        mean, error = mean_error([float(row[key]) for row in rows], [row["image"] for row in rows])
        return {"mean": mean, "se": error, "n": len(rows)}

    families = list(dict.fromkeys(o["family"] for o in outcomes))
    levels = sorted({level for o in outcomes for level in o.get("difficulty", {}).items()})
    return {
        "accuracy": metric("correct"),
        **({"top5": metric("top5")} if any(o.get("top5") is not None for o in outcomes) else {}),
        **{f"accuracy/{f}": metric("correct", [o for o in outcomes if o["family"] == f]) for f in families},
        **{
            f"difficulty/{name}: {level}": metric(
                "correct", [o for o in outcomes if o.get("difficulty", {}).get(name) == level]
            )
            for name, level in levels
        },
        "early_accuracy": metric("early_correct"),
        "hit_rate": metric("target_hit"),
        "target_share": metric("target_share"),
        **{name: metric(name) for name in ("visual_tokens", "tokens_left") if outcomes and name in outcomes[0]},
        "images": len(set(images)),
    }


def compare(outcomes: Sequence[dict], others: Sequence[dict]) -> dict:
    """Paired comparison with another row on the samples that both rows have with a score (n).

    difference  of the accuracies, with its standard error and its bootstrap interval (images as clusters)
    p           McNemar's exact test; None where either row is a mean over seeds, or answers are partly right
    agreement   the fraction of equal answers
    flips       ids of samples that only the first row answers correctly ("gained"), that only the other one does ("lost"),
                and that both answer wrongly in different words ("changed")
    """
    other = {o["id"]: o for o in others}
    both = [(o, other[o["id"]]) for o in outcomes if o["id"] in other]
    agreement, agreement_error = mean_error([agree(a, b) for a, b in both], [a["image"] for a, _ in both])
    pairs = [(a, b) for a, b in both if a["correct"] is not None and b["correct"] is not None]
    images = [a["image"] for a, _ in pairs]
    differences = [float(a["correct"]) - float(b["correct"]) for a, b in pairs]
    difference, error = mean_error(differences, images)
    single = bool(pairs) and all(isinstance(o["correct"], bool) for pair in pairs for o in pair)
    return {
        "n": len(pairs),
        "difference": difference,
        "se": error,
        "interval": list(bootstrap(differences, images)),
        "p": mcnemar([a["correct"] for a, _ in pairs], [b["correct"] for _, b in pairs]) if single else None,
        "agreement": agreement,
        "agreement_se": agreement_error,
        "flips": flips(pairs) if single else None,
    }


def agree(a: dict, b: dict) -> float:
    """Agreement of two outcomes: 1 for equal answers; for several seeds, the fraction of equal answers over all pairs."""
    ours, theirs = (o.get("predictions") or [o["prediction"]] for o in (a, b))
    return sum(a == b for a in ours for b in theirs) / (len(ours) * len(theirs))


def flip(outcome: dict, other: dict) -> str:
    """Kind of a flipped answer: "gained" a right one, "lost" one, or "changed" one wrong answer for another."""
    if outcome["correct"] == other["correct"]:
        return "changed"
    return "gained" if outcome["correct"] else "lost"


def flips(pairs: Sequence[tuple[dict, dict]]) -> dict[str, list[str]]:
    """Ids of the samples whose answers differ, by effect on correctness."""
    ids: dict[str, list[str]] = {"gained": [], "lost": [], "changed": []}
    for a, b in pairs:
        if a["correct"] != b["correct"] or a["prediction"] != b["prediction"]:
            ids[flip(a, b)].append(a["id"])
    return ids


def over_seeds(runs: Sequence[Sequence[dict]]) -> list[dict]:
    """Merge the outcomes of several seeds into one per sample that all seeds have.

    `correct` is the fraction of correct seeds, `predictions` lists their answers; all else is of the first seed.
    """
    others = [{o["id"]: o for o in run} for run in runs[1:]]
    merged = []
    for first in runs[0]:
        if not all(first["id"] in run for run in others):
            continue
        same = [first, *(run[first["id"]] for run in others)]
        means = {
            key: _mean([o[key] for o in same]) for key in ("correct", "early_correct", "target_hit", "target_share")
        }
        merged.append({**first, **means, "predictions": [o["prediction"] for o in same]})
    return merged


def _mean(values: Sequence) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def spread(summaries: Sequence[dict]) -> dict:
    """Metrics over several seeds of one row: the mean, its standard error as for one seed, and the sd between seeds."""
    merged = {}
    for name, first in summaries[0].items():
        if not isinstance(first, dict):
            merged[name] = first
            continue
        means = [s[name]["mean"] for s in summaries if name in s and s[name]["mean"] is not None]
        merged[name] = {**first, "mean": float(np.mean(means)) if means else None}
        merged[name]["sd"] = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return merged


def commonest(outcomes: Sequence[dict]) -> dict:
    """Answer prior: accuracy of the commonest answer of each family, {"accuracy", "accuracy/FAMILY"}.

    Several accepted answers of a question count as one. Without scored questions the dict is empty.
    """
    answers = defaultdict(Counter)
    for outcome in outcomes:
        if outcome["correct"] is not None:
            answers[outcome["family"]][outcome["answer"]] += 1
    most = {family: max(counts.values()) for family, counts in answers.items()}
    total = sum(counts.total() for counts in answers.values())
    families = {f"accuracy/{family}": n / answers[family].total() for family, n in most.items()}
    return {"accuracy": sum(most.values()) / total, **families} if total else {}


def passing(outcomes: Sequence[dict], tau: float) -> dict:
    """Words of the instructions whose relevance is at least τ (relevance is stored with four digits).

    passing, none  mean number of such words per question, and the fraction of questions without any
    top            the 12 words that pass in the most questions, each with the fraction of its questions in which it passes
    """
    known = [o["words"] for o in outcomes if o.get("words")]
    counts, passed = Counter(), Counter()
    through = [[word for word, score in words if score is not None and score >= tau] for words in known]
    for words, good in zip(known, through, strict=True):
        counts.update({word.strip() for word, score in words if score is not None})
        passed.update({word.strip() for word in good})
    often = sorted(passed, key=lambda word: (-passed[word], word))
    return {
        "passing": float(np.mean([len(good) for good in through])) if known else 0.0,
        "none": float(np.mean([not good for good in through])) if known else 0.0,
        "n": len(known),
        "top": [[word, passed[word] / counts[word]] for word in often[:12]],
    }
