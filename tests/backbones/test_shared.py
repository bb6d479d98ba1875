"""Work that rows share: the same answers bit for bit, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXTS, images, inputs, llava, plan_of

import ivtp
from ivtp.backbones.vlm.vision_cache import VisionCache, tensor_bytes
from ivtp.core.plan import Plan


def logits(plan, batch, cache=None, target_patches=None):
    options = {"vision_cache": cache, "target_patches": target_patches}
    with ivtp.prune(llava(), plan, **options, instruction=list(TEXTS)) as run:
        found = llava()(**batch).logits
    return found, run.trace


def variants():
    """Plans with one vision side, and what happens in the language model of each."""
    settings = [{"tau": 0.1}, {"tau": 1.0}, {"words": "all"}, {"words": "rt"}, {"reference": "last"}]
    settings.append({"language_score": "random"})
    return [plan_of("ivtp", llava(), **s) for s in settings]


def test_rows_that_share_the_vision_side_answer_bit_for_bit_as_alone():
    batch, cache = inputs(), VisionCache(1 << 30)
    for plan in variants():
        alone, before = logits(plan, batch)
        together, after = logits(plan, batch, cache)
        assert torch.equal(alone, together)
        assert all(torch.equal(a.position, b.position) for a, b in zip(before.vision, after.vision, strict=True))
    assert (cache.misses, cache.hits) == (1, len(variants()) - 1)


@pytest.mark.parametrize("name", ivtp.list_pruners())
def test_no_pruner_takes_what_another_looked_at(name):
    """One cache for all of them: what is not the same in the tower is made anew."""
    cache, batch = VisionCache(1 << 30), inputs()
    others = [Plan(), plan_of("ivtp", llava()), plan_of("random", llava(), seed=1), plan_of("random", llava(), seed=2)]
    for plan in (*others, plan_of(name, llava())):
        assert torch.equal(logits(plan, batch, cache)[0], logits(plan, batch)[0])


def test_other_images_and_other_orders_are_other_batches():
    cache, plan = VisionCache(1 << 30), variants()[0]
    first, other = inputs(), inputs()
    other["pixel_values"] = images(len(TEXTS), seed=9)
    turned = {k: v.flip(0) if k == "pixel_values" else v for k, v in first.items()}
    for batch in (first, other, turned):
        assert torch.equal(logits(plan, batch, cache)[0], logits(plan, batch)[0])
    assert cache.hits == 0


def test_memory_stays_below_its_limit_and_is_given_back():
    batch, plans = inputs(), [plan_of("random", llava(), seed=seed) for seed in range(6)]
    one = VisionCache(1 << 30)
    logits(plans[0], batch, one)
    cache = VisionCache(int(2.5 * one.bytes))
    for plan in plans:
        assert torch.equal(logits(plan, batch, cache)[0], logits(plan, batch)[0])
        assert cache.bytes <= cache.limit
    assert len(cache._outputs) == 2
    cache.keep_for(plans[1:2])
    assert cache.bytes == one.bytes and len(cache._outputs) == 1
    logits(plans[1], batch, cache)
    assert cache.hits == 1
    cache.keep_for([])
    assert cache.bytes == 0


def test_what_nobody_needs_later_is_not_kept():
    cache = VisionCache(1 << 30)
    cache.open = False
    logits(variants()[0], inputs(), cache)
    assert cache.bytes == 0


def test_bytes_count_all_that_a_view_holds_on_to():
    large = torch.zeros(1000)
    assert tensor_bytes(large[:1]) == 4000 and tensor_bytes((large, [large])) == 8000 and tensor_bytes("text") == 0


def test_the_oracle_keeps_what_it_is_told_and_only_it_needs_to_be_told():
    plan = plan_of("ivtp", llava(), keep=4, language_score="asked", vision_keep=25)
    patches = torch.zeros(3, 25, dtype=torch.bool)
    patches[0, [1, 7, 20]] = patches[1, [3, 4, 5, 6, 8, 9]] = True
    _, trace = logits(plan, inputs(), target_patches=patches)
    kept = [set(row.tolist()) for row in trace.kept.position]
    assert {1, 7, 20} < kept[0] and kept[1] < {3, 4, 5, 6, 8, 9} and len(kept[2]) == 4
    with pytest.raises(ValueError, match="target_patches"):
        logits(plan, inputs())
    with pytest.raises(ValueError, match=r"\(3, 24\)"):
        logits(plan, inputs(), target_patches=patches[:, :24])


def test_the_oracle_sees_through_the_order_that_a_merge_leaves():
    """Tokens stand in raster order for the language model, whatever the tower made of it."""
    from dataclasses import replace

    oracle = plan_of("ivtp", llava(), keep=3, language_score="asked")
    plan = replace(oracle, vision=plan_of("evit", llava(), keep=11).vision)
    _, before = logits(plan, inputs(), target_patches=torch.zeros(3, 25, dtype=torch.bool))
    survivors = before.vision[-1].position
    patches = torch.zeros(3, 25, dtype=torch.bool).scatter(1, survivors[:, [2, 5, 7]], True)
    _, trace = logits(plan, inputs(), target_patches=patches)
    assert [set(r.tolist()) for r in trace.kept.position] == [set(t.nonzero()[:, 0].tolist()) for t in patches]


def test_the_words_of_before_still_work_and_name_the_new_ones():
    plan, cache, patches = variants()[0], VisionCache(1 << 30), torch.zeros(3, 25, dtype=torch.bool)
    with pytest.warns(DeprecationWarning, match="is now") as warned:
        context = ivtp.prune(llava(), plan, shared=cache, truth=patches)
    assert sorted(str(warning.message) for warning in warned) == [
        "shared= of ivtp.prune is now vision_cache=",
        "truth= of ivtp.prune is now target_patches=",
    ]
    with context:
        llava()(**inputs())
    assert cache.misses == 1
