"""How much methods agree on what to keep: against sets and loops, and in what a run leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.running import lines, one_line, outcomes, run, spawn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ivtp.report.overlap import heat_map, jaccard, overlaps, table, together
from ivtp.results import Result

ROWS = (
    "[{label:unpruned,pruner:none},{label:chance,pruner:random,section:a,seeds:2},"
    "{label:'{pruner} {ratio}',series:'{pruner}',section:a,sweep:{pruner:[topk,ats,spatial_pooling],ratio:[1/9,1/3]}},"
    "{label:other,pruner:fastv,section:b}]"
)


def naive(kept: list[list[list[int]]]) -> list[list[float]]:
    def pair(a, b):
        each = [len(set(x) & set(y)) / len(set(x) | set(y)) if x or y else 1.0 for x, y in zip(a, b, strict=True)]
        return sum(each) / len(each)

    return [[pair(a, b) for b in kept] for a in kept]


@given(st.data())
def test_it_is_the_mean_jaccard_index(data):
    patches = data.draw(st.integers(1, 13))
    rows, samples = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    some = st.lists(st.integers(0, patches - 1), unique=True)
    kept = data.draw(st.lists(st.lists(some, min_size=samples, max_size=samples), min_size=rows, max_size=rows))
    found = jaccard(kept, patches)
    np.testing.assert_allclose(found, naive(kept), atol=1e-6)
    np.testing.assert_array_equal(found, found.T)


def row(label: str, tokens: int, section: str = "a", patches: int = 9, series: str = "") -> Result:
    return Result(label=label, section=section, tokens=[patches, tokens], series=series)


def kept_by(*kept: list[int] | None) -> list[dict]:
    return [{"id": str(number), "kept": each} for number, each in enumerate(kept)]


def test_rows_are_compared_at_the_same_count_and_in_one_section_only():
    rows = [row("whole", 9), row("p 2", 2, series="p"), row("q 2", 2, series="q"), row("r 3", 3), row("s", 2, "b")]
    found = {
        "whole": kept_by(None, None),
        "p 2": kept_by([1, 2], [3, 4]),
        "r 3": kept_by([1, 2, 3], [1]),
        "s": kept_by([1], [1]),
    }
    found["q 2"] = kept_by([2, 3], [3, 4])[::-1]  # the order of the samples in the file does not count
    (overlap,) = overlaps(rows, found, "a")
    assert (overlap.tokens, overlap.patches, overlap.names) == (2, 9, ["p", "q"])
    assert overlap.mean[0, 1] == pytest.approx((1 / 3 + 1) / 2)
    rows[2] = row("q 2", 2, series="p")
    assert next(overlaps(rows, found, "a")).names == ["p 2", "q 2"]
    assert list(overlaps(rows, found, "b")) == []


def test_chance_is_what_uniform_choices_have():
    generator = np.random.default_rng(0)
    kept = [[generator.choice(144, 48, replace=False).tolist() for _ in range(500)] for _ in range(2)]
    rows = [row("a", 48, patches=144), row("b", 48, patches=144)]
    (overlap,) = overlaps(rows, {"a": kept_by(*kept[0]), "b": kept_by(*kept[1])}, "a")
    assert overlap.mean[0, 1] == pytest.approx(overlap.chance, abs=0.01)
    title, heads, cells, note, _ = table(overlap)
    assert "48 of 144" in title and heads == ["row", "most like", "a", "b"] and "about 20" in note
    assert cells[0] == ["a", "b", "–", f"{100 * overlap.mean[0, 1]:.0f}"]


def test_those_that_agree_stand_beside_each_other():
    mean = np.array([[1, 0.1, 0.9, 0.1], [0.1, 1, 0.1, 0.8], [0.9, 0.1, 1, 0.1], [0.1, 0.8, 0.1, 1]])
    order = together(mean)
    assert sorted(order) == [0, 1, 2, 3]
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def test_without_rows_to_compare_there_is_no_picture(tmp_path):
    assert not heat_map([], tmp_path / "x.png") and not (tmp_path / "x.png").exists()


def test_a_run_has_a_matrix_per_count_in_table_page_and_picture(tmp_path):
    assert run(f"variants={ROWS}", "name=few", "overlap=a", "viewer=0", output=tmp_path) == 0
    folder = tmp_path / "few"
    text, page = (folder / "table.md").read_text(), (folder / "report.html").read_text()
    for title in ("Overlap of kept tokens, 36 of 324", "Overlap of kept tokens, 108 of 324"):
        assert f"## {title}" in text and title in page
    head = next(line for line in text.splitlines() if "most like" in line)
    assert head.startswith("| row | most like | chance | topk | ats | spatial_pooling |")
    with Image.open(folder / "overlap.png") as picture:
        assert picture.width > picture.height
    records = {record["label"]: record for record in lines(folder / "results.jsonl")}
    assert {record["series"] for record in records.values()} >= {"topk", "ats", "spatial_pooling"}
    labels = ["chance · seed 0", "topk 1/9", "ats 1/9", "spatial_pooling 1/9"]
    expected = naive([[o["kept"] for o in outcomes(folder, records[label])] for label in labels])
    body = text.split("## Overlap of kept tokens, 36 of 324")[1].splitlines()[4:8]
    for number, (line, values) in enumerate(zip(body, expected, strict=True)):
        shown = [cell.strip() for cell in line.split("|")[3:-1]]
        assert shown == ["–" if i == number else f"{100 * value:.0f}" for i, value in enumerate(values)]


def test_a_section_that_is_not_there_is_refused(tmp_path):
    done = spawn(f"variants={ROWS}", "overlap=c", "debug=limit", f"output={tmp_path}")
    assert done.returncode == 2 and "section to show the overlap of: 'c'" in one_line(done.stderr).replace('"', "'")
