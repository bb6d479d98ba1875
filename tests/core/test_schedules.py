"""Schedules: the paper's own numbers, and one line for what cannot be carried out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivtp.core.plan import Plan, Stage
from ivtp.core.schedule import Cut, Schedule, equal_ratio, group_ends
from ivtp.core.scores import Layerwise, Rollout


def test_the_default_split_is_the_papers_reading():
    assert equal_ratio(576, 64, 12) == [480, 399, 333, 277, 231, 192, 160, 133, 111, 92, 77, 64]


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 40))
def test_equal_ratio_never_grows_and_meets_the_budget(tokens, keep, cuts):
    keep = min(tokens, keep)
    counts = equal_ratio(tokens, keep, cuts)
    assert counts[-1] == keep
    assert all(a >= b >= 1 for a, b in zip([tokens, *counts], counts, strict=False))


def test_groups_end_at_their_last_layer():
    assert group_ends(24, 3) == [2, 5, 8, 11, 14, 17, 20, 23]
    assert group_ends(7, 3) == [2, 5]
    assert group_ends(7, "all") == [6]
    assert group_ends(7, 1) == list(range(7))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: group_ends(7, 8), "group=8 is larger than the stack: only 7 layers are grouped; use at most that"),
        (lambda: group_ends(7, 0), "group=0 must be a positive number of layers or 'all'"),
        (lambda: group_ends(7, -2), "group=-2 must be a positive"),
        (lambda: group_ends(7, "some"), "group='some' must be a positive"),
        (
            lambda: Schedule((Cut(2, 700),)).check(576, 24, "vision"),
            "keep=700, but only 576 visual tokens reach vision layer 2; keep at most 576",
        ),
        (
            lambda: Schedule((Cut(2, 5), Cut(4, 6))).check(9, 24, "language"),
            "keep=6, but only 5 visual tokens reach language layer 4",
        ),
        (
            lambda: Schedule((Cut(2, 0),)).check(9, 24, "vision"),
            "keep=0 at vision layer 2: at least 1 visual token must stay",
        ),
        (
            lambda: Schedule((Cut(24, 5),)).check(9, 24, "vision"),
            "layer=24 does not exist: the vision stack has layers 0 to 23",
        ),
        (lambda: Schedule((Cut(-2, 5, "block"),)).check(9, 24, "vision"), "layer=-2 does not exist"),
        (lambda: Schedule((Cut(4, 8), Cut(2, 5))).check(9, 24, "vision"), "cuts must be in order"),
        (lambda: Schedule((Cut(4, 8, "block"), Cut(4, 5, "attn"))).check(9, 24, "vision"), "cuts must be in order"),
        (lambda: Cut(2, 5, "ffn"), "after='ffn' is not one of attn, block"),
        (lambda: Cut(-1, 5), "layer=-1 is before the first layer, which has no attention; use after='block'"),
        (lambda: Stage((Cut(2, 5), Cut(2, 4, "block")), Rollout()), "cut at layer 2 has seen no attention since"),
        (lambda: Stage((Cut(-1, 5, "block"),), Layerwise()), "cut at layer -1 has seen no attention yet"),
        (lambda: Plan(reference="cls"), "reference='cls' is not one of last, pseudo_cls"),
        (lambda: Plan(position_ids="shift"), "position_ids='shift' is not one of keep, renumber"),
        (lambda: Plan(tau=float("nan")), "tau=nan is not a number"),
        (
            lambda: Plan(language=Stage((Cut(4, 5),), Rollout()), reference="pseudo_cls", part1=4),
            "part1=4: .* at least 5 layers",
        ),
        (lambda: Plan(language=Stage((Cut(4, 5),), Rollout()), reference="visual_cls"), "part1=0"),
    ],
)
def test_errors_name_value_bound_and_fix(broken, message):
    with pytest.raises(ValueError, match=message) as error:
        broken()
    assert "\n" not in str(error.value)
