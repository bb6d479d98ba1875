"""Intervals, flips and seeds against definitions written out."""

from __future__ import annotations

import math
import random

import pytest
from scipy.stats import norm

from ivtp.evaluation.statistics import agree, bootstrap, compare, flips, over_seeds, passing, spread
from ivtp.report.claims import together, verdict, verdicts_on
from ivtp.results import Result


def outcome(i, correct, prediction="a", image=None, **more):
    kept = {"early_correct": correct, "target_hit": None, "target_share": None}
    return {"id": str(i), "image": image or str(i), "correct": correct, "prediction": prediction, **kept, **more}


def slow_bootstrap(values, clusters, resamples=4000, seed=5):
    """One resample after the other, cluster by cluster, with another generator."""
    rng, groups = random.Random(seed), {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    names, means = list(groups), []
    for _ in range(resamples):
        drawn = [x for _ in names for x in groups[rng.choice(names)]]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    return means[int(0.025 * resamples)], means[int(0.975 * resamples)]


def test_the_interval_is_that_of_a_bootstrap_written_as_a_loop():
    rng = random.Random(1)
    clusters = [str(i // (1 + i % 7)) for i in range(150)]  # of very different sizes
    of = {c: rng.gauss(0, 1) for c in set(clusters)}
    values = [of[c] + rng.gauss(0, 0.3) for c in clusters]
    assert bootstrap(values, clusters) == pytest.approx(slow_bootstrap(values, clusters), abs=0.04)


def test_the_interval_is_the_normal_one_for_many_independent_values():
    rng = random.Random(2)
    values = [rng.gauss(0.3, 2) for _ in range(900)]
    low, high = bootstrap(values, range(900))
    error = 2 / math.sqrt(900) * norm.ppf(0.975)
    mean = sum(values) / 900
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.02)


def test_questions_about_one_image_do_not_count_as_independent():
    values = [float(i % 2) for i in range(40) for _ in range(5)]
    narrow, wide = bootstrap(values, range(200)), bootstrap(values, [i // 5 for i in range(200)])
    assert wide[1] - wide[0] > 1.8 * (narrow[1] - narrow[0])


def test_the_same_seed_gives_the_same_interval_and_blocks_change_nothing(monkeypatch):
    rng = random.Random(3)
    values, clusters = [rng.random() for _ in range(20)], list("abcdefghij") * 2
    first = bootstrap(values, clusters)
    assert first == bootstrap(values, clusters) != bootstrap(values, clusters, seed=1)
    monkeypatch.setattr("ivtp.evaluation.statistics.BLOCK", 30)
    assert bootstrap(values, clusters) == first


@pytest.mark.parametrize("clusters", [[], ["a"], ["a", "a"]])
def test_fewer_than_two_images_have_no_interval(clusters):
    assert all(math.isnan(x) for x in bootstrap([1.0] * len(clusters), clusters))


def test_a_comparison_has_its_interval_and_names_what_flipped():
    ours = [outcome(0, True), outcome(1, False, "b"), outcome(2, False, "c"), outcome(3, True)]
    theirs = [outcome(3, False, "x"), outcome(2, False, "d"), outcome(1, True), outcome(0, True)]
    found = compare(ours, theirs)
    assert found["flips"] == {"gained": ["3"], "lost": ["1"], "changed": ["2"]}
    assert found["difference"] == 0 and found["interval"][0] < 0 < found["interval"][1]
    assert found["p"] == 1.0
    assert found["agreement"] == 0.25
    assert flips([(ours[0], ours[0])]) == {"gained": [], "lost": [], "changed": []}


def test_seeds_are_drawn_together_sample_by_sample():
    runs = [[outcome(0, True, "a"), outcome(1, False, "b")], [outcome(1, True, "a"), outcome(0, True, "a")]]
    merged = over_seeds(runs)
    assert [o["correct"] for o in merged] == [1.0, 0.5]
    assert [o["predictions"] for o in merged] == [["a", "a"], ["b", "a"]]
    against = compare(merged, [outcome(0, True, "a"), outcome(1, True, "a")])
    assert against["difference"] == -0.25
    assert against["agreement"] == 0.75
    assert against["p"] is None and against["flips"] is None


def test_agreement_of_seeds_is_over_all_pairs():
    assert agree({"prediction": "a"}, {"prediction": "a"}) == 1
    assert (
        agree({"prediction": "a", "predictions": ["a", "b"]}, {"prediction": "a", "predictions": ["a", "a", "b"]})
        == 0.5
    )


def test_the_spread_between_seeds_is_the_sample_standard_deviation():
    merged = spread([{"accuracy": {"mean": m, "se": 0.1, "n": 9}, "images": 3} for m in (0.2, 0.4, 0.9)])
    assert merged["accuracy"]["mean"] == pytest.approx(0.5)
    assert merged["accuracy"]["sd"] == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))
    assert merged["images"] == 3
    assert spread([{"accuracy": {"mean": 0.2, "se": 0.1, "n": 9}}])["accuracy"]["sd"] is None


def row(label, seeds_of=None) -> Result:
    metrics = {"accuracy": {"mean": 0.5 if label.endswith("0") else 1.0, "se": 0.1, "n": 2}}
    speed = {"questions_per_second": 10.0, "batch_size": 1}
    return Result(label=label, seeds_of=seeds_of, metrics=metrics, speed=speed)


def test_rows_of_several_seeds_become_one_in_their_place():
    rows = [row("unpruned"), row("random · seed 0", "random"), row("random · seed 1", "random"), row("ivtp")]
    outcomes = {r.label: [outcome(0, r.label != "random · seed 0")] for r in rows}
    merged, found = together(rows, outcomes)
    assert [r.label for r in merged] == ["unpruned", "random", "ivtp"]
    assert merged[1].seeds == 2 and merged[1].metrics["accuracy"]["mean"] == 0.75
    assert found["random"][0]["correct"] == 0.5 and found["ivtp"] == outcomes["ivtp"]


@pytest.mark.parametrize(
    ("interval", "said"),
    [([0.1, 0.2], "yes"), ([-0.2, -0.1], "no"), ([-0.1, 0.2], "not significant"), ([0.0, 0.0], "not significant"),
     ([math.nan, math.nan], "not significant"), ([None, None], "not significant")],
)  # fmt: skip
def test_a_claim_holds_only_where_its_interval_leaves_out_zero(interval, said):
    assert verdict({"interval": interval}) == said


def test_claims_are_judged_in_the_direction_in_which_they_are_made():
    good = [outcome(i, True) for i in range(30)]
    bad = [outcome(i, i % 3 == 0) for i in range(30)]
    claims = [
        {"claim": "x", "rows": ["good", "bad"], "paper": 2.0},
        {"claim": "y", "rows": ["bad", "good"], "paper": None},
    ]
    first, second = verdicts_on(claims, {"good": good, "bad": bad}, "table1")
    assert (first["agrees"], second["agrees"]) == ("yes", "no")
    assert first["difference"] == pytest.approx(2 / 3) == -second["difference"]


def test_words_that_pass_are_counted_per_question_and_per_word():
    said = [
        outcome(0, True, words=[["red", 0.5], [" is", 0.1], ["?", None]]),
        outcome(1, True, words=[["red", 0.1], [" is", 0.2]]),
        outcome(2, True, words=[[" is", 0.0]]),
        outcome(3, True, words=None),
    ]
    found = passing(said, 0.2)
    assert found == {
        "passing": pytest.approx(2 / 3),
        "none": pytest.approx(1 / 3),
        "n": 3,
        "top": [["is", 1 / 3], ["red", 0.5]],
    }
    assert passing(said, -1)["none"] == 0 and passing(said, 1)["passing"] == 0
