"""`python -m ivtp.bench suite=lead`: what it runs and records, on models of a few numbers; how long it takes is not tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivtp.bench import main
from ivtp.timing import lead
from ivtp.timing.lead import LEAD, NONE, OWN, Lead, alternate
from ivtp.timing.models import SMALL
from ivtp.timing.report import tables

ROOT = Path(__file__).parents[2]


def test_every_case_is_timed_on_both_checkouts():
    """Ours against itself: another checkout is one that lies elsewhere."""
    settings = Lead(("fastv", "vispruner"), (9,), (1, 2), 2, str(ROOT), SMALL, 11)
    record = lead.run(settings)
    found = record["lead"]["cases"]
    names = [(case["pruner"], case["batch"]) for case in found]
    assert names == [(name, batch) for batch in (1, 2) for name in (OWN, NONE, "fastv")]
    assert "at least 8" in record["lead"]["left_out"]["vispruner"]
    for case in found:
        assert set(case["seconds"]) == set(case["peak_bytes"]) == {"this", "against"}
        assert all(times["rounds"] == 2 for times in case["seconds"].values())
        assert case["peak_bytes"]["this"] == case["peak_bytes"]["against"] > 0
        assert case["over_own"]["median"] > 0 < case["over_against"]["median"]
        if case["pruner"] == OWN:
            assert case["peak_of_own"] == case["over_own"]["median"] == 1.0
    assert {"device", "blas", "instructions", "kernel"} <= set(record["machine"])
    (table,) = tables(record)
    assert len(table.lines) == len(found) and all(len(line) == len(table.heads) for line in table.lines)
    assert "vispruner" in table.note


def test_checkouts_and_cases_alternate():
    order: list[str] = []

    def ask(name: str):
        def answer(case: dict, wanted: str) -> dict:
            order.append(f"{name}{case['pruner']}")
            return {wanted: 1.0}

        return answer

    cases = [{"pruner": 1}, {"pruner": 2}]
    seconds = alternate(cases, {"a": ask("a"), "b": ask("b")}, 2, lambda line: None)
    assert order == ["b2", "a2", "b1", "a1", "a1", "b1", "a2", "b2", "b2", "a2", "b1", "a1"]
    assert all(values == [1.0, 1.0] for each in seconds for values in each.values())


def test_all_pruners_are_cases_at_the_sizes_of_the_issue():
    cases = Lead().cases()
    pruners = {case["pruner"] for case in cases}
    assert {None, "none", "fastv", "ivtp", "tome"} <= pruners
    assert {case["keep"] for case in cases if case["pruner"] == "fastv"} == {64, 192}
    assert {case["batch"] for case in cases if case["pruner"] == "fastv"} == {1, 8}
    assert [case["pruner"] for case in cases if "model" in case] == [None, "tome"]
    assert (LEAD.vision["num_hidden_layers"], LEAD.text["hidden_size"]) == (12, 768)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("suite=lead", "pruners=fastw"), "Did you mean 'fastv'?"),
        (("suite=lead", "against=/nowhere"), "against=/nowhere is no checkout of ivtp"),
        (("suite=lead", "model=llava_1_5_7b"), "suite=lead has one model"),
        (("suite=tiny", "keep=9"), "keep: of suite=lead alone"),
    ],
)
def test_what_cannot_be_timed_is_said_in_one_line(capsys, arguments, said):
    assert main([*arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and said in shown.err
    assert len(shown.err.splitlines()) == 1
