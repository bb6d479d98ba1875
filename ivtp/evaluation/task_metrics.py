"""Metrics that a benchmark task computes over all its documents, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from ivtp.data.failures import DataError
from ivtp.evaluation.statistics import mean_error
from ivtp.lmms.judges import JudgeError

GROUPS = 100
"""Parts of the images that are left out in turn: enough for two digits of an error."""


def measured(scores: Sequence, lost: Collection[str] = ()) -> dict:
    """Metrics {name: {"mean", "se", "n"}} of the scores that are numbers.

    "score" has the same fields and its "name": the main metric, or the sum of several.

    scores  of a data set: see `ivtp.lmms.dataset.Score`
    lost    images about which a sample failed. A metric that pairs the questions about an image leaves them out
    """
    metrics, numbers = {}, []
    for score in scores:
        try:
            value = score.aggregate(score.values)
        except JudgeError:
            raise
        except DataError:
            score = without(score, lost)
            if not lost or not score.values:
                raise
            value = score.aggregate(score.values)
        if value is not None:  # None: the metric only writes a file
            numbers.append(score)
            metrics[score.name] = {"mean": value, "se": error([score], value), "n": len(score.values)}
    main = [score for score in numbers if score.main]
    if main:
        value = sum(metrics[score.name]["mean"] for score in main)
        one = metrics[main[0].name]["se"] if len(main) == 1 else error(main, value)
        n = sum(len(score.values) for score in main)
        metrics["score"] = {"mean": value, "se": one, "n": n, "name": " + ".join(score.name for score in main)}
    return metrics


def without(score, images: Collection[str]):
    """Copy of a score without the documents about some images."""
    indices = [i for i, name in enumerate(score.clusters) if name not in images]

    def chosen(values: list | None) -> list | None:
        return values and [values[i] for i in indices]

    return replace(score, values=chosen(score.values), singles=chosen(score.singles), clusters=chosen(score.clusters))


def error(scores: Sequence, value: float) -> float:
    """Standard error of the sum of some metrics, images as clusters; NaN where it cannot be computed.

    A mean over documents has a closed form; all else uses the delete-a-group jackknife (Kott 2001). Unlike the bootstrap it
    never passes a document twice to a metric, which metrics over pairs of documents (MME) refuse.
    """
    if len(scores) == 1 and scores[0].singles is not None:
        mean, deviation = mean_error(scores[0].singles, scores[0].clusters)
        for scale in (1, 100):
            if math.isclose(scale * mean, value, abs_tol=1e-9):
                return scale * deviation
    if not all(score.sampled for score in scores):
        return math.nan
    names = sorted({name for score in scores for name in score.clusters})
    count = min(GROUPS, len(names))
    if count < 2:
        return math.nan
    group = dict(zip(names, np.random.default_rng(0).permutation(len(names)) % count, strict=True))
    estimates = []
    for left_out in range(count):
        remaining = [
            [v for v, name in zip(score.values, score.clusters, strict=True) if group[name] != left_out]
            for score in scores
        ]
        try:
            estimates.append(sum(score.aggregate(values) for score, values in zip(scores, remaining, strict=True)))
        except (DataError, TypeError):  # too few documents to leave some out
            return math.nan
    return float(math.sqrt((count - 1) / count * np.square(np.array(estimates) - np.mean(estimates)).sum()))


def own(metrics: dict) -> list[str]:
    """Names of the benchmark task's metrics among those of a row; "score" only if it is a sum of several."""
    names = [name for name in metrics if "/" in name and not name.startswith(("accuracy/", "difficulty/"))]
    return names + (["score"] if "score" in metrics and metrics["score"]["name"] not in names else [])


def principal(metrics: dict) -> dict:
    """Main metric of a row: the benchmark task's score, in its own unit, else accuracy."""
    return metrics.get("score") or metrics["accuracy"]


def headline(metrics: dict) -> str:
    """Main metric of a row with its standard error, as text."""
    if "score" in metrics:
        return f"{metrics['score']['name']} {number(metrics['score'])}"
    accuracy = metrics["accuracy"]
    if not accuracy["n"]:
        return "not scored"
    error = "" if accuracy["se"] != accuracy["se"] else f" ± {100 * accuracy['se']:.1f}"
    return f"{100 * accuracy['mean']:.1f}{error} %"


def number(metric: dict) -> str:
    """Format a metric in its own unit, as "0.8591 ± 0.0034"."""
    spread = metric["se"] if metric.get("sd") is None else metric["sd"]
    sd = "" if metric.get("sd") is None else " sd"
    known = spread is not None and spread == spread
    return f"{metric['mean']:.4g}" + (f" ± {spread:.2g}{sd}" if known else "")
