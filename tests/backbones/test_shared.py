"""Work that rows share: the same answers bit for bit, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXTS, images, inputs, llava, plan_of

import ivtp
from ivtp.backbones.shared import SharedVision, held
from ivtp.pruning.pruner import Plan


def logits(plan, batch, shared=None, truth=None):
    with ivtp.prune(llava(), plan, shared=shared, truth=truth, instruction=list(TEXTS)) as run:
        found = llava()(**batch).logits
    return found, run.trace


def variants():
    """Plans with one vision side, and what happens in the language model of each."""
    settings = [{"tau": 0.1}, {"tau": 1.0}, {"words": "all"}, {"words": "rt"}, {"reference": "last"}]
    settings.append({"language_score": "random"})
    return [plan_of("ivtp", llava(), **s) for s in settings]


def test_rows_that_share_the_vision_side_answer_bit_for_bit_as_alone():
    batch, shared = inputs(), SharedVision(1 << 30)
    for plan in variants():
        alone, before = logits(plan, batch)
        together, after = logits(plan, batch, shared)
        assert torch.equal(alone, together)
        assert all(torch.equal(a.position, b.position) for a, b in zip(before.vision, after.vision, strict=True))
    assert (shared.misses, shared.hits) == (1, len(variants()) - 1)


@pytest.mark.parametrize("name", ivtp.list_pruners())
def test_no_pruner_takes_what_another_looked_at(name):
    """One cache for all of them: what is not the same in the tower is made anew."""
    shared, batch = SharedVision(1 << 30), inputs()
    others = [Plan(), plan_of("ivtp", llava()), plan_of("random", llava(), seed=1), plan_of("random", llava(), seed=2)]
    for plan in (*others, plan_of(name, llava())):
        assert torch.equal(logits(plan, batch, shared)[0], logits(plan, batch)[0])


def test_other_images_and_other_orders_are_other_batches():
    shared, plan = SharedVision(1 << 30), variants()[0]
    first, other = inputs(), inputs()
    other["pixel_values"] = images(len(TEXTS), seed=9)
    turned = {k: v.flip(0) if k == "pixel_values" else v for k, v in first.items()}
    for batch in (first, other, turned):
        assert torch.equal(logits(plan, batch, shared)[0], logits(plan, batch)[0])
    assert shared.hits == 0


def test_memory_stays_below_its_limit_and_is_given_back():
    batch, plans = inputs(), [plan_of("random", llava(), seed=seed) for seed in range(6)]
    one = SharedVision(1 << 30)
    logits(plans[0], batch, one)
    shared = SharedVision(int(2.5 * one.bytes))
    for plan in plans:
        assert torch.equal(logits(plan, batch, shared)[0], logits(plan, batch)[0])
        assert shared.bytes <= shared.limit
    assert len(shared._kept) == 2
    shared.keep_for(plans[1:2])
    assert shared.bytes == one.bytes and len(shared._kept) == 1
    logits(plans[1], batch, shared)
    assert shared.hits == 1
    shared.keep_for([])
    assert shared.bytes == 0


def test_what_nobody_needs_later_is_not_kept():
    shared = SharedVision(1 << 30)
    shared.open = False
    logits(variants()[0], inputs(), shared)
    assert shared.bytes == 0


def test_bytes_count_all_that_a_view_holds_on_to():
    large = torch.zeros(1000)
    assert held(large[:1]) == 4000 and held((large, [large])) == 8000 and held("text") == 0


def test_the_oracle_keeps_what_it_is_told_and_only_it_needs_to_be_told():
    plan = plan_of("ivtp", llava(), keep=4, language_score="asked", vision_keep=25)
    truth = torch.zeros(3, 25, dtype=torch.bool)
    truth[0, [1, 7, 20]] = truth[1, [3, 4, 5, 6, 8, 9]] = True
    _, trace = logits(plan, inputs(), truth=truth)
    kept = [set(row.tolist()) for row in trace.kept.position]
    assert {1, 7, 20} < kept[0] and kept[1] < {3, 4, 5, 6, 8, 9} and len(kept[2]) == 4
    with pytest.raises(ValueError, match="truth"):
        logits(plan, inputs())
    with pytest.raises(ValueError, match=r"\(3, 24\)"):
        logits(plan, inputs(), truth=truth[:, :24])


def test_the_oracle_sees_through_the_order_that_a_merge_leaves():
    """Tokens stand in raster order for the language model, whatever the tower made of it."""
    from dataclasses import replace

    oracle = plan_of("ivtp", llava(), keep=3, language_score="asked")
    plan = replace(oracle, vision=plan_of("evit", llava(), keep=11).vision)
    _, before = logits(plan, inputs(), truth=torch.zeros(3, 25, dtype=torch.bool))
    survivors = before.vision[-1].position
    truth = torch.zeros(3, 25, dtype=torch.bool).scatter(1, survivors[:, [2, 5, 7]], True)
    _, trace = logits(plan, inputs(), truth=truth)
    assert [set(r.tolist()) for r in trace.kept.position] == [set(t.nonzero()[:, 0].tolist()) for t in truth]
