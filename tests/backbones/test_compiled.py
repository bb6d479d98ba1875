"""The prefill as one graph, the tower in batches of its own, and the LM head where it is needed: faster, and the same."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, close, inputs, llava, plan_of
from helpers.compiled import answered

import ivtp
from ivtp.backbones.vlm.vision_cache import VisionCache
from ivtp.registry import UserError


def test_a_compiled_prefill_is_one_graph_with_equal_outputs():
    """A question to the data inside the loop would break the graph; what one prompt says, baked into it, would answer
    for another. In a process of its own: the checker of shapes looks at every call, which no compiler can follow."""
    methods = ["ivtp:aot_eager", "fastv:eager", "rollout:eager"]
    env = os.environ | {"JAXTYPING_DISABLE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "compiled.py"), *methods]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == methods


def test_a_method_that_asks_its_data_says_so():
    """DART's pivots take their turn in the order of a Python set: its graph would hold one batch's order for ever."""
    model = llava()
    with pytest.raises(UserError, match="cannot be one graph, since its pivots take their turn"):
        answered(model, plan_of("dart", model), inputs(), lambda run: run.compile({"backend": "eager"}))


def test_parts_of_one_graph_cannot_be_told_apart():
    with (
        pytest.raises(ValueError, match="leave part= out"),
        ivtp.prune(llava(), "none", part=lambda name: nullcontext()) as run,
    ):
        run.compile()


@pytest.mark.parametrize("name", ["ivtp", "random", "tome", "ats", "none"])
def test_the_tower_in_batches_of_its_own_sees_the_same(name):
    """Rows in another order, or noise and counts that depend on who else is in the batch, would change the answers."""
    model, batch = llava(), inputs()
    plan = plan_of(name, model)
    logits, trace = answered(model, plan, batch)
    batches: list[int] = []
    first = model.model.vision_tower
    first = getattr(first, "vision_model", first).encoder.layers[0].self_attn
    hook = first.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))

    def two_at_once(run) -> None:
        run.vision_batch = 2

    try:
        found, seen = answered(model, plan, batch, two_at_once)
        shared = VisionCache(1 << 20)
        again, _ = answered(model, plan, batch, two_at_once, vision_cache=shared)
    finally:
        hook.remove()
    assert batches == [2, 1, 2, 1]
    assert shared.misses == 1
    close(found, logits)  # rounding differs with the batch, and nine layers make more of it
    close(again, logits)
    with ivtp.prune(model, plan, instruction=list(TEXTS)) as run:
        features = model.model(**batch).image_hidden_states
        run.vision_batch = 2
        close(model.model(**batch).image_hidden_states, features, 1e-6)
    for cut, expected in zip(seen.vision + seen.language, trace.vision + trace.language, strict=True):
        assert torch.equal(cut.position[cut.valid], expected.position[expected.valid])


def test_generating_runs_the_head_on_the_last_position_only():
    """The head of a 7B model over 600 positions costs as much as two of its layers."""
    model, rows = llava(), []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    try:
        with ivtp.prune(model, plan_of("fastv", model)):
            model.generate(**inputs(), max_new_tokens=3, do_sample=False)
    finally:
        hook.remove()
    assert rows == [1, 1, 1]
