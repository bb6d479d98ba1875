"""Errors and paired tests against naive implementations of their definitions."""

from __future__ import annotations

import math
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivtp.evaluation.statistics import commonest, compare, mcnemar, mean_error, summary


def naive_cluster_error(values, clusters):
    """The sandwich estimator as it is written: a sum over pairs of observations of one cluster."""
    n, names = len(values), sorted(set(clusters))
    mean = sum(values) / n
    total = 0.0
    for i in range(n):
        for j in range(n):
            if clusters[i] == clusters[j]:
                total += (values[i] - mean) * (values[j] - mean)
    return math.sqrt(max(0.0, total) * len(names) / (len(names) - 1)) / n


def naive_mcnemar(gained: int, lost: int) -> float:
    """Every way in which fair coins could have fallen that is at most as likely as what was seen, two-sided."""
    n = gained + lost
    if n == 0:
        return 1.0
    smaller = min(gained, lost)
    return min(1.0, 2 * sum(comb(n, k) for k in range(smaller + 1)) / 2**n)


observations = st.lists(st.tuples(st.sampled_from("abcdefg"), st.floats(-1, 1)), min_size=2, max_size=40)


@given(observations)
def test_the_error_of_clustered_means_is_the_sandwich_estimator(rows):
    clusters, values = zip(*rows, strict=True)
    mean, error = mean_error(values, clusters)
    assert mean == pytest.approx(np.mean(values))
    if len(set(clusters)) == 1:
        assert math.isnan(error)
    else:
        assert error == pytest.approx(naive_cluster_error(values, clusters), abs=1e-9)


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_without_clusters_it_is_the_usual_standard_error(values):
    _, error = mean_error([float(v) for v in values], [str(i) for i in range(len(values))])
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-12)


def test_it_agrees_with_a_bootstrap_over_images_and_a_naive_error_does_not():
    rng = np.random.default_rng(0)
    easy = rng.normal(0.6, 0.25, 120)
    clusters = np.repeat(np.arange(120), 5)
    values = (rng.random(600) < np.clip(easy, 0, 1)[clusters]).astype(float)
    _, error = mean_error(values, clusters.astype(str))
    sums = values.reshape(120, 5).mean(1)
    means = [sums[rng.integers(0, 120, 120)].mean() for _ in range(4000)]
    assert error == pytest.approx(np.std(means), rel=0.05)
    assert error > 1.1 * values.std() / math.sqrt(600)


def test_nothing_has_no_mean_and_one_cluster_no_error():
    assert all(math.isnan(x) for x in mean_error([], []))
    mean, error = mean_error([1.0, 0.0], ["a", "a"])
    assert mean == 0.5
    assert math.isnan(error)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_is_exact_and_symmetric(pairs):
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    gained = sum(a and not b for a, b in pairs)
    lost = sum(b and not a for a, b in pairs)
    assert mcnemar(ours, theirs) == pytest.approx(naive_mcnemar(gained, lost), rel=1e-9)
    assert mcnemar(theirs, ours) == pytest.approx(mcnemar(ours, theirs))


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1), (5, 5, 1), (0, 5, 0.0625), (1, 9, 0.021484375), (0, 10, 2 / 1024)]
)
def test_mcnemar_by_hand(gained, lost, p):
    ours = [True] * gained + [False] * lost + [True, False] * 20
    theirs = [False] * gained + [True] * lost + [True, False] * 20
    assert mcnemar(ours, theirs) == pytest.approx(p)


def outcome(name, image, correct, **more):
    given = {"id": name, "image": image, "family": "exist", "answer": "yes", "prediction": "yes" if correct else "no"}
    return {**given, "correct": correct, "early_correct": correct, "target_hit": None, "target_share": None, **more}


def test_the_summary_has_every_family_and_leaves_out_what_nobody_asked():
    rows = [
        outcome("1", "a", True, target_hit=True, target_share=0.5),
        outcome("2", "a", False, target_hit=False, target_share=0.0),
        outcome("3", "b", True, family="count", early_correct=False),
    ]
    found = summary(rows)
    assert found["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert found["accuracy"]["n"] == 3
    assert found["accuracy/exist"]["mean"] == 0.5
    assert found["accuracy/count"]["mean"] == 1.0
    assert found["early_accuracy"]["mean"] == pytest.approx(1 / 3)
    assert (found["hit_rate"]["n"], found["hit_rate"]["mean"], found["target_share"]["mean"]) == (2, 0.5, 0.25)
    assert found["images"] == 2


def test_accuracy_is_given_per_level_of_difficulty_among_the_questions_that_state_one():
    rows = [
        outcome("1", "a", True, difficulty={"size": "small", "place": "new"}),
        outcome("2", "a", False, difficulty={"size": "small"}),
        outcome("3", "b", True, difficulty={"size": "large"}),
        outcome("4", "b", False),
    ]
    found = {name: (m["mean"], m["n"]) for name, m in summary(rows).items() if name.startswith("difficulty/")}
    assert found == {
        "difficulty/place: new": (1, 1),
        "difficulty/size: large": (1, 1),
        "difficulty/size: small": (0.5, 2),
    }


def test_the_commonest_answer_of_each_family_is_the_prior():
    answers = [("exist", "yes"), ("exist", "yes"), ("exist", "no"), ("count", "2")]
    rows = [outcome(str(i), "a", True, family=f, answer=a) for i, (f, a) in enumerate(answers)]
    found = commonest([*rows, outcome("9", "a", None, answer="no")])
    assert found == {"accuracy": 3 / 4, "accuracy/exist": pytest.approx(2 / 3), "accuracy/count": 1.0}
    assert commonest([outcome("9", "a", None)]) == {}


def test_comparisons_pair_by_id_whatever_the_order_and_only_what_both_have():
    ours = [outcome(str(i), str(i // 2), i % 3 > 0) for i in range(12)]
    theirs = [outcome(str(i), str(i // 2), i % 2 > 0) for i in range(10)][::-1]
    found = compare(ours, theirs)
    pairs = [(i % 3 > 0, i % 2 > 0) for i in range(10)]
    assert found["n"] == 10
    assert found["difference"] == pytest.approx(np.mean([a - b for a, b in pairs]))
    assert found["se"] == pytest.approx(
        naive_cluster_error([a - b for a, b in pairs], [str(i // 2) for i in range(10)])
    )
    assert found["p"] == pytest.approx(naive_mcnemar(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)))
    assert found["agreement"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    back = compare(theirs, ours)
    assert back["difference"] == pytest.approx(-found["difference"])
    assert back["p"] == pytest.approx(found["p"])


def test_a_row_compared_with_itself_differs_in_nothing():
    rows = [outcome(str(i), str(i), bool(i % 2)) for i in range(8)]
    found = compare(rows, rows)
    assert (found["difference"], found["se"], found["p"], found["agreement"]) == (0, 0, 1, 1)


def test_pairing_makes_the_error_of_a_difference_smaller_where_methods_fail_on_the_same_questions():
    rng = np.random.default_rng(1)
    hard = rng.random(400) < 0.4
    flips = [rng.random(400) < 0.05 for _ in range(2)]
    rows = [[outcome(str(i), str(i), bool(~hard[i] ^ flip[i])) for i in range(400)] for flip in flips]
    unpaired = math.hypot(*(summary(r)["accuracy"]["se"] for r in rows))
    assert compare(*rows)["se"] < 0.6 * unpaired


def test_families_stand_in_the_order_in_which_they_are_asked():
    rows = [outcome(str(i), str(i), True, family=family) for i, family in enumerate("cab")]
    assert [key for key in summary(rows) if key.startswith("accuracy/")] == ["accuracy/c", "accuracy/a", "accuracy/b"]


def test_the_reference_implementations_of_this_file_are_right_on_a_case_worked_by_hand():
    # Two clusters, (1, 1) and (0, 0): residual sums ±1, so the error is sqrt(2/1 · 2) / 4 = 0.5.
    assert naive_cluster_error([1, 1, 0, 0], "aabb") == pytest.approx(0.5)
    # Every outcome of four coins with at most one head on one side, counted one by one.
    extreme = sum(1 for k in range(5) for _ in combinations(range(4), k) if k <= 1 or k >= 3)
    assert naive_mcnemar(1, 3) == pytest.approx(extreme / 16)
