"""The zoo as it ships: nobody is missing, and who is compared spends the same."""

from __future__ import annotations

from functools import cache

import pytest

from ivtp.experiment.config import load_config
from ivtp.experiment.planning import build_shape, plan_rows
from ivtp.experiment.variants import variants
from ivtp.pruners import load_pruner, shipped_pruners

PROMPT, INSTRUCTION = 9, 9
"""Near those of `scenes2`, whose costs decide which rows the embedded model can have."""


@cache
def planned() -> list:
    config = load_config(["experiment=zoo"])
    return plan_rows(list(variants(config)), build_shape(config), PROMPT, INSTRUCTION)


def section(name: str) -> list:
    return [row for row in planned() if row.section == name]


def test_every_pruner_is_there_at_three_budgets():
    ours = set(shipped_pruners()) - {"none", "ivtp_v"}
    for tokens in (36, 72, 108):
        rows = [row for row in section("equal tokens") if row.cost.tokens[-1] == tokens]
        assert {row.pruner["name"] for row in rows} == ours
        assert len([row for row in rows if row.pruner["name"] == "random"]) == 3
    assert len(section("equal tokens")) == 3 * (len(ours) + 2)


def test_the_one_left_out_is_another_by_name():
    shape = build_shape(load_config([]))
    assert load_pruner("ivtp_v", shape, keep=16) == load_pruner("rollout", shape, keep=16)


def test_equal_flops_are_equal_on_the_embedded_model():
    anchors = {row.label: row.cost.total for row in planned()}
    rows = section("equal FLOPs")
    for row in rows:
        assert row.cost.total == pytest.approx(anchors[row.budget["like"]], rel=0.02), row.label
    names = {row.pruner["name"] for row in rows}
    assert names == {row.pruner["name"] for row in section("equal tokens")} - {"fastv"}
    assert len(rows) == 3 * (len(names) + 2) - 3  # two of pdrop and one of downsample are left out


def test_all_budgets_of_a_method_are_one_line_of_the_plot():
    assert {row.series for row in planned()} == {"unpruned", *(row.pruner["name"] for row in planned()[1:])}
