"""Accuracy with standard errors, and paired comparisons on the same samples."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest


def mean_error(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """Mean and its standard error when values of one cluster (questions about one image) are not independent."""
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
    """Exact two-sided McNemar p for two methods on the same samples: only samples where they differ say anything."""
    gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost).pvalue)


def summary(outcomes: Sequence[dict]) -> dict:
    """Metrics of one row: {name: {"mean", "se", "n"}}; accuracies per family and over all questions."""
    images = [o["image"] for o in outcomes]

    def metric(key: str, rows: Sequence[dict] = outcomes) -> dict:
        rows = [row for row in rows if row[key] is not None]
        mean, error = mean_error([float(row[key]) for row in rows], [row["image"] for row in rows])
        return {"mean": mean, "se": error, "n": len(rows)}

    families = list(dict.fromkeys(o["family"] for o in outcomes))
    return {
        "accuracy": metric("correct"),
        **{f"accuracy/{f}": metric("correct", [o for o in outcomes if o["family"] == f]) for f in families},
        "acc_early": metric("early_correct"),
        "hit": metric("hit"),
        "share": metric("share"),
        "images": len(set(images)),
    }


def compare(outcomes: Sequence[dict], others: Sequence[dict]) -> dict:
    """Paired comparison with another row on the samples that both have: difference ± error, McNemar p, agreement."""
    other = {o["id"]: o for o in others}
    pairs = [(o, other[o["id"]]) for o in outcomes if o["id"] in other]
    images = [a["image"] for a, _ in pairs]
    difference, error = mean_error([float(a["correct"]) - float(b["correct"]) for a, b in pairs], images)
    agreement, agreement_error = mean_error([float(a["prediction"] == b["prediction"]) for a, b in pairs], images)
    return {
        "n": len(pairs),
        "difference": difference,
        "se": error,
        "p": mcnemar([a["correct"] for a, _ in pairs], [b["correct"] for _, b in pairs]),
        "agreement": agreement,
        "agreement_se": agreement_error,
    }
