"""The context itself: threads, nesting, copies, wrappers; whatever happens inside, the model is afterwards what it was."""

from __future__ import annotations

import asyncio
import gc
import io
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial

import pytest
import torch
from conftest import TEXTS, close, images, inputs, llava, make_llava, plan_of, vision_model
from helpers.families import batch, family
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ivtp
from ivtp.backbones import ModelError
from ivtp.registry import UserError


def state(model) -> dict:
    """All that a context could leave behind in a model, its configs and transformers."""
    # Models with M-RoPE keep the offset of the last prompt.
    modules = {n: {k: v for k, v in vars(m).items() if k != "rope_deltas"} for n, m in model.named_modules()}
    hooks = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}
    kernels = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    return {"modules": modules, "hooks": hooks, "kernels": kernels, "interface": dict(ALL_ATTENTION_FUNCTIONS)}


@contextmanager
def untouched(model):
    """Also while threads take turns as often as Python lets them."""
    before, interval = state(model), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
    assert str(state(model)) == str(before)


def logits(model, rows, steps: int = 3) -> torch.Tensor:
    with torch.inference_mode():
        out = model.generate(
            **rows, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(out.logits, 1)


def in_threads(work: list[Callable]) -> list:
    """What each returns, all begun at once."""
    start = threading.Barrier(len(work))

    def run(one: Callable):
        start.wait(60)
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(120) for future in [pool.submit(run, one) for one in work]]


@pytest.mark.parametrize("name", ["ivtp", "prumerge"])
def test_threads_share_one_context(name):
    """Each gets the answers, and the trace, that it would get alone."""
    model = llava()
    plan, rows = plan_of(name, model), [inputs([text]) for text in TEXTS] + [inputs()]
    with ivtp.prune(model, plan) as run:
        alone = [(logits(model, one), run.trace.kept.position) for one in rows]
    logits(model, rows[0])
    with untouched(model), ivtp.prune(model, plan) as run:
        together = in_threads([lambda one=one: (logits(model, one), run.trace.kept.position) for one in rows])
        assert run.trace.kept is not None  # of any thread, for one that prefilled nothing
    for (actual, kept), (expected, places) in zip(together, alone, strict=True):
        assert torch.equal(actual, expected) and torch.equal(kept, places)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_context_per_thread(kind):
    """Other pruners, over and over, on one model; a thread without a context of its own, one that asks for none."""
    model = family(kind)[0]
    sizes = [None] * 3 if kind == "llava" else [(84, 70), (56, 84), (70, 70)]
    rows, names = [batch(kind, size=size) for size in sizes], ["fastv", "topk", None]
    settings = [{"keep": 11}, {"keep": 15}, {}]

    def pruned(rows, name, asked):
        found = []
        for _ in range(2):
            with ivtp.prune(model, name, **asked):
                found.append(logits(model, rows, 2))
        return found

    unpruned = logits(model, rows[2], 2)
    each = list(zip(rows, names, settings, strict=True))
    alone = [pruned(*one)[0] for one in each]
    assert torch.equal(alone[2], unpruned)
    with untouched(model), ivtp.prune(model, "random", keep=7):
        outer = logits(model, rows[2], 2)
        work = [partial(pruned, *one) for one in each]
        *together, without = in_threads([*work, lambda: [logits(model, rows[2], 2)] * 2])
        assert torch.equal(logits(model, rows[2], 2), outer)
    assert torch.equal(logits(model, rows[2], 2), unpruned)
    for found, expected in zip([*together, without], [*alone, outer], strict=True):
        assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


def pooled(out) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.pooler_output


@pytest.mark.parametrize(
    "backbone", ["clip_sdpa", "siglip_sdpa", "dinov2_sdpa", "timm_map", "timm_eva02", "openclip_avg"]
)
def test_threads_share_a_tower(backbone):
    """A tower's pooling is given masks, and for small images the tower other sizes, for the length of one call."""
    model, pixels = vision_model(backbone), [images(2, seed=seed) for seed in range(4)]
    plans = [
        plan_of("downsample", model, keep=9),
        plan_of("prumerge", model, keep=11, adaptive=True),
        plan_of("layerwise", model, keep=4),
        plan_of("none", model),
    ]

    def pruned(plan, shown):
        found = []
        for _ in range(3):
            with ivtp.prune(model, plan) as run:
                found.append((pooled(model(shown)), run.vision))
        return found

    alone = [pruned(plan, shown)[0] for plan, shown in zip(plans, pixels, strict=True)]
    with untouched(model):
        together = in_threads(
            [lambda plan=plan, shown=shown: pruned(plan, shown) for plan, shown in zip(plans, pixels, strict=True)]
        )
        with ivtp.prune(model, plans[1]):
            shared = in_threads([lambda shown=shown: model(shown) for shown in pixels])
            one_by_one = [model(shown) for shown in pixels]
    for found, (expected, cuts) in zip(together, alone, strict=True):
        for actual, places in found:
            assert torch.equal(actual, expected)
            for one, other in zip(places, cuts, strict=True):
                assert torch.equal(one.position, other.position)
    for actual, expected in zip(shared, one_by_one, strict=True):
        assert torch.equal(pooled(actual), pooled(expected))


def test_an_exception_in_one_thread_is_its_own():
    model, rows = llava(), inputs()
    plan = plan_of("fastv", model)
    with ivtp.prune(model, plan):
        expected = logits(model, rows)
    broken = {key: value for key, value in rows.items() if key != "pixel_values"}

    def fails():
        for _ in range(3):
            with pytest.raises(ValueError, match="its images make none"), ivtp.prune(model, plan_of("topk", model)):
                logits(model, broken)

    def answers_():
        with ivtp.prune(model, plan):
            return logits(model, rows)

    with untouched(model):
        found = in_threads([fails, answers_, fails, answers_])
    assert torch.equal(found[1], expected) and torch.equal(found[3], expected)


def test_contexts_nest_and_may_be_closed_in_any_order():
    model, rows = llava(), inputs()
    plans = [plan_of("fastv", model), plan_of("topk", model)]
    unpruned, expected = logits(model, rows), []
    for plan in plans:
        with ivtp.prune(model, plan):
            expected.append(logits(model, rows))
    assert not torch.equal(*expected)
    with untouched(model):
        with ivtp.prune(model, plans[0]):
            with ivtp.prune(model, plans[1]):
                assert torch.equal(logits(model, rows), expected[1])
                with ivtp.prune(model, None):
                    assert torch.equal(logits(model, rows), unpruned)
                # A thread that opened nothing: what holds in the thread that did.
                assert torch.equal(in_threads([lambda: logits(model, rows)])[0], expected[1])
            assert torch.equal(logits(model, rows), expected[0])
        outer, inner = ivtp.prune(model, plans[0]), ivtp.prune(model, plans[1])
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        assert torch.equal(logits(model, rows), expected[1])
        in_threads([lambda: inner.__exit__(None, None, None)])
        assert torch.equal(logits(model, rows), unpruned)


def test_asyncio_tasks_have_contexts_of_their_own():
    """They take turns in one thread, and hand the work of a context to others."""
    model, rows = llava(), inputs()
    plans = [plan_of("fastv", model), plan_of("topk", model)]

    async def pruned(plan):
        with ivtp.prune(model, plan):
            await asyncio.sleep(0.01)
            here = logits(model, rows)
            return here, await asyncio.to_thread(logits, model, rows)

    async def both():
        return await asyncio.gather(*map(pruned, plans))

    alone = [asyncio.run(pruned(plan))[0] for plan in plans]
    with untouched(model):
        for found, expected in zip(asyncio.run(both()), alone, strict=True):
            assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


def test_a_context_that_nobody_closed_ends_with_its_last_reference():
    model = llava()
    with untouched(model):
        context = ivtp.prune(model, "fastv", keep=5)
        context.__enter__()
        del context
        gc.collect()


def test_a_context_is_entered_once():
    model = llava()
    context = ivtp.prune(model, "fastv", keep=5)
    with untouched(model):
        with context, pytest.raises(UserError, match=r"entered before.*call ivtp\.prune"), context:
            pass
        with pytest.raises(UserError, match="entered before"), context:
            pass

        @ivtp.prune(model, "fastv", keep=5)
        def decorated():
            return model(**inputs()).logits

        assert torch.equal(decorated(), decorated())


def test_several_models_at_once():
    """Two of them, with one config object between them, each under its own plan, in one thread and in two."""
    models = [llava(), deepcopy(llava())]
    for name, module in models[1].named_modules():
        if hasattr(module, "config"):
            module.config = models[0].get_submodule(name).config
    rows, plans = inputs(), [plan_of("fastv", models[0]), plan_of("topk", models[0])]
    expected = []
    for plan in plans:
        with ivtp.prune(models[0], plan):
            expected.append(logits(models[0], rows))
    contexts = ivtp.prune(models[0], plans[0]), ivtp.prune(models[1], plans[1]), ivtp.prune(llava("eager"), plans[0])
    with untouched(models[0]), untouched(models[1]), contexts[0], contexts[1], contexts[2]:
        found = [logits(model, rows) for model in models]
        found += in_threads([lambda model=model: logits(model, rows) for model in models])
        close(logits(llava("eager"), rows), expected[0])
    for actual, of in zip(found, expected * 2, strict=True):
        assert torch.equal(actual, of)


@pytest.mark.parametrize("kind", ["llava", "clip_sdpa", "timm_avg", "openclip_avg"])
def test_a_copy_taken_inside_is_not_pruned(kind):
    """By deepcopy, pickle or torch.save; it works by itself, also under a plan of its own; and a shallow one, afterwards."""
    model = deepcopy(make_llava() if kind == "llava" else vision_model(kind))
    pixels = inputs() if kind == "llava" else {"x": images(2)}

    def answer(model):
        if kind == "llava":
            return model(**pixels).logits
        return pooled(model(pixels["x"]))

    twin = deepcopy(model)  # some of what transformers gives a model in its first forward cannot be pickled
    unpruned = answer(twin)
    names = {name: list(vars(module)) for name, module in model.named_modules()}
    plan = plan_of("topk", model)
    with ivtp.prune(model, plan):
        weights = model.state_dict()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        copies = [deepcopy(model), pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(model, 0))]
        shallow = copy(model)
        pruned = answer(model)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    assert not torch.equal(pruned, unpruned) and list(weights) == list(twin.state_dict())
    assert torch.equal(answer(shallow), unpruned)
    for other in copies:
        assert {name: list(vars(module)) for name, module in other.named_modules()} == names
        assert torch.equal(answer(other), unpruned)
        with ivtp.prune(other, plan):
            assert torch.equal(answer(other), pruned)
        assert torch.equal(answer(other), unpruned)


def test_a_forward_that_the_model_had_of_its_own_comes_back():
    """accelerate gives the parts of a model on several devices a forward each."""
    model, rows = deepcopy(llava()), inputs()
    core = model.model
    core.forward = given = partial(type(core).forward, core)
    unpruned = model(**rows).logits
    with untouched(model), ivtp.prune(model, "fastv", keep=5):
        assert not torch.equal(model(**rows).logits[:, -1], unpruned[:, -1])
        assert isinstance(deepcopy(model).model.forward, partial)
    assert core.forward is given and torch.equal(model(**rows).logits, unpruned)


def test_a_model_is_saved_as_it_is(tmp_path):
    from transformers import LlavaForConditionalGeneration

    model = llava()
    with untouched(model), ivtp.prune(model, "fastv", keep=5):
        model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)


def test_data_parallel():
    """On a CPU it calls the model itself. Its copies on other GPUs would run the first GPU's layers: refused."""
    model, rows = llava(), inputs()
    wrapped = torch.nn.DataParallel(model)
    with ivtp.prune(model, "fastv", keep=5):
        expected = model(**rows).logits
        assert torch.equal(wrapped(**rows).logits, expected)
        # As torch.nn.parallel.replicate does.
        with pytest.raises(UserError, match="one process for each GPU"):
            [module._replicate_for_data_parallel() for module in wrapped.modules()]
    model._replicate_for_data_parallel()
    with pytest.raises(ModelError, match=r"prune\(model.module"), ivtp.prune(wrapped, "fastv", keep=5):
        pass
