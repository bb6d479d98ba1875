"""Errors of metrics over all documents against naive implementations of their definitions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivtp.data.questions import DataError
from ivtp.evaluation.statistics import mean_error
from ivtp.evaluation.task_metrics import GROUPS, error, headline, measured, number, own, principal


def score(values, aggregate, clusters=None, singles=None, **more):
    clusters = clusters or [str(i) for i in range(len(values))]
    more = {"name": "task/metric", "sampled": True, "main": True, **more}
    return SimpleNamespace(values=values, aggregate=aggregate, clusters=clusters, singles=singles, **more)


def mean(values):
    return sum(values) / len(values)


def f1(values):
    hits = sum(said and true for said, true in values)
    return 2 * hits / (sum(said for said, _ in values) + sum(true for _, true in values))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_the_error_of_a_mean_is_that_of_lmms_eval(values):
    from lmms_eval.api.metrics import mean_stderr

    found = measured([score(values, mean, singles=values)])["task/metric"]
    assert found["se"] == pytest.approx(mean_stderr(values), abs=1e-12)
    assert (found["mean"], found["n"]) == (mean(values), len(values))


def test_a_percentage_has_an_error_in_percent():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    found = measured([score(values, lambda v: 100 * mean(v), singles=values)])["task/metric"]
    assert found["se"] == pytest.approx(100 * np.std(values, ddof=1) / math.sqrt(5))


def test_the_jackknife_leaves_out_one_image_with_all_its_questions_in_turn():
    rng = np.random.default_rng(3)
    values = [(bool(a), bool(b)) for a, b in rng.integers(0, 2, (35, 2))]
    clusters = [str(i // 5) for i in range(35)]
    without = [f1([v for v, c in zip(values, clusters, strict=True) if c != name]) for name in dict.fromkeys(clusters)]
    naive = math.sqrt(6 / 7 * sum((x - np.mean(without)) ** 2 for x in without))
    assert error([score(values, f1, clusters)], f1(values)) == pytest.approx(naive)


def test_of_a_mean_it_is_the_usual_error():
    values = list(np.random.default_rng(0).normal(size=41))
    assert error([score(values, mean)], mean(values)) == pytest.approx(mean_error(values, list(map(str, range(41))))[1])


def test_many_images_are_left_out_in_groups_and_the_error_stays_what_it_is():
    rng = np.random.default_rng(1)
    values = [(bool(a), bool(b)) for a, b in rng.integers(0, 2, (3000, 2))]
    calls = []

    def counted(values):
        calls.append(len(values))
        return f1(values)

    found = error([score(values, counted)], f1(values))
    draws = [f1([values[i] for i in rng.integers(0, 3000, 3000)]) for _ in range(300)]
    assert len(calls) == GROUPS and set(calls) == {2970}
    assert found == pytest.approx(np.std(draws), rel=0.2)


def test_a_metric_that_pairs_documents_up_has_an_error_though_no_bootstrap_could_give_one():
    """MME refuses a question that it sees twice."""

    def paired(values):
        if len(values) != len(set(values)):
            raise DataError("twice")
        return float(sum(values))

    values = list(range(20))
    assert error([score(values, paired, [str(i // 2) for i in values])], paired(values)) > 0


def test_no_error_is_made_up_where_there_is_none():
    def too_few(values):
        if len(values) < 4:
            raise DataError("too few")
        return 1.5

    assert math.isnan(error([score([1, 2, 3, 4], too_few)], 1.5))
    assert math.isnan(error([score([1, 2, 3, 4], lambda v: 1.5, sampled=False)], 1.5)), "it would ask a judge again"
    assert math.isnan(error([score([1, 2], lambda v: 1.5, clusters=["a", "a"])], 1.5))


def test_the_sum_of_two_metrics_is_the_row_s_score_with_an_error_of_its_own():
    perception, cognition = ([float(x) for x in np.random.default_rng(i).integers(0, 200, 12)] for i in (0, 1))
    images = [str(i // 2) for i in range(12)]
    scores = [
        score(values, lambda v: float(sum(v)), images, name=f"mme/{name}")
        for name, values in (("perception", perception), ("cognition", cognition))
    ]
    found = measured(scores)
    assert found["score"]["mean"] == sum(perception) + sum(cognition)
    assert (found["score"]["name"], found["score"]["n"]) == ("mme/perception + mme/cognition", 24)
    both = np.array(perception).reshape(6, 2).sum(1) + np.array(cognition).reshape(6, 2).sum(1)
    without = both.sum() - both
    naive = math.sqrt(5 / 6 * np.square(without - without.mean()).sum())
    assert found["score"]["se"] == pytest.approx(naive), "both halves of one image go together"
    assert own(found) == ["mme/perception", "mme/cognition", "score"]


def test_what_only_writes_a_file_is_no_metric():
    found = measured(
        [score([1, 2], mean, singles=[1.0, 2.0]), score([{}], lambda v: None, name="task/submission", main=False)]
    )
    assert list(found) == ["task/metric", "score"]
    assert own(found) == ["task/metric"]


def test_a_row_is_about_its_score_else_about_accuracy():
    accuracy = {"mean": 0.5, "se": 0.1, "n": 4}
    assert principal({"accuracy": accuracy}) == accuracy
    assert headline({"accuracy": accuracy}) == "50.0 ± 10.0 %"
    found = {"mean": 1862.4, "se": 12.34, "n": 9, "name": "mme/sum"}
    assert principal({"accuracy": accuracy, "score": found}) == found
    assert headline({"accuracy": accuracy, "score": found}) == "mme/sum 1862 ± 12"
    assert number({**found, "se": None}) == "1862"
    assert number({**found, "sd": 3.21}) == "1862 ± 3.2 sd"
