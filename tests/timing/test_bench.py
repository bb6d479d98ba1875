"""`python -m ivtp.bench`: that it measures what it says, on models of a few numbers; how long things take is not tested."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
from conftest import close
from PIL import Image

import ivtp
from ivtp.bench import main
from ivtp.core.flops import cost
from ivtp.evaluation.profiling import flop_counter, peak_bytes
from ivtp.experiment.config import load_config
from ivtp.experiment.planning import build_shape
from ivtp.registry import UserError
from ivtp.timing.decoding import TokenTimes
from ivtp.timing.measure import Run, interleave, ratio, summary
from ivtp.timing.models import BOS, IMAGE, LLAVA_7B, LLAVA_NEXT_7B, SMALL, SMALL_CROPS, build, prompts
from ivtp.timing.peers import eager_maps, missing_kvpress, rollout_over_dense, scores_from_maps, snapkv
from ivtp.timing.pipeline import Load, processor_of, write_photographs
from ivtp.timing.prefill import Case, cache_bytes, entered, executed, kv_bytes, measure, rest
from ivtp.timing.report import BOUNDS, tables
from ivtp.timing.suites import SUITES, run_pipeline, with_model
from ivtp.timing.throughput import ORDERS, in_batches


@pytest.fixture(scope="module", params=[SMALL, SMALL_CROPS], ids=lambda size: size.name)
def case(request):
    """Two prompts, pruned to 9 of 25 tokens, or to 45 of five crops' 125."""
    model = build(request.param, "cpu", torch.float32)
    return Case(model, 2, 13, 45 if request.param.crops else 9)


def test_the_bench_prints_one_object_with_the_ratios_it_is_asked_for(capfd):
    """Scripts read the last line of this command; a key that is gone, or text beside it, breaks them."""
    assert main(["suite=tiny", "rounds=1", "json=true"]) == 0
    out = capfd.readouterr().out
    assert len(out.strip().splitlines()) == 1
    record = json.loads(out)
    for key in ("scoring_overhead", "speedup_over_promise", "loop_overhead", "import_seconds"):
        assert math.isfinite(record[key]), key
    assert set(record["rollout_over_dense"]) == {"time", "memory"}
    assert record["rollout"]["difference"] < 1e-5
    assert {"device", "cores", "torch", "transformers", "dtype", "kernel"} <= set(record["machine"])
    assert [(c["model"], c["packed"], c["text"]) for c in record["cases"]] == [
        ("tiny", False, 11),
        ("tiny", True, 11),
        ("tiny, crops", False, 11),
        ("tiny, crops", False, 31),
    ]
    products = {False: "aten::mm", True: "mkldnn::_linear_pointwise"}
    for found in record["cases"]:
        assert set(found["seconds"]) == {"unpruned", "none", "ivtp", "random"}
        assert found["speedup_promised"] > 1
        assert all(products[found["packed"]] in operators for operators in found["operators"].values())
        # Rows of the unpruned prefill and of the layers behind the last cut.
        tokens, newlines = {"tiny": ((25, 9), 0), "tiny, crops": ((125, 45), 10)}[found["model"]]
        rows = [found["batch"] * (n + newlines + found["text"]) for n in tokens]
        assert list(found["product_flops"]) == list(map(str, rows))
        for bytes_ in found["cache_bytes"].values():
            assert bytes_["found"] == bytes_["closed"]
    for sizes in record["throughput"]["images_per_second"].values():
        assert {size: set(orders) for size, orders in sizes.items()} == {size: set(ORDERS) for size in ("1", "3")}
    for found in record["decoding"]:
        for name, whole in found["answer"].items():
            first, token = found["first"][name]["median"], found["token"][name]["median"]
            assert 0 < first < first + token < whole["median"] * 1.001
    for found in record["methods"]:
        rows = found["rows"]
        assert set(rows) == {
            "unpruned",
            *(f"{name} {keep}" for name in ("fastv", "tome") for keep in found_keeps(found)),
        }
        whole = rows.pop("unpruned")
        assert all(row["cache_bytes"] < whole["cache_bytes"] and row["promised"] > 1 for row in rows.values())
    assert [found["n"] for found in record["sums"]] == [33] and record["sums"][0]["error"]["sums"] < 1e-6
    for found in record["end_to_end"]:
        for name in ("unpruned", "ivtp"):
            assert set(found[name]["over_model"]) == {"0"} and found[name]["images"] == 3
    # The ratios of the suite are those of its last case.
    assert record["scoring_overhead"] == record["cases"][-1]["scoring_overhead"]["median"]
    known = set(record) | {f"rollout_over_dense.{name}" for name in record["rollout_over_dense"]} | {"main_job_seconds"}
    known.add("pipeline.clip.over_model.2.median")  # of suite=pipeline
    assert {key for key, *_ in BOUNDS} <= known


def found_keeps(found: dict) -> tuple[int, int]:
    """A ninth and a third of the tokens."""
    return (2, 8) if found["model"] == "tiny" else (13, 41)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("suite=cpp", "Did you mean 'cpu'?"),
        ("suit=cpu", "Did you mean 'suite'?"),
        ("json=yes", "json=yes must be true or false"),
        ("rounds=0", "rounds=0 must be a whole number of at least 1"),
        ("cpu", "'cpu' is not of the form key=value"),
        ("model=llava_1_5_8b", "Did you mean 'llava_1_5_7b'?"),
        ("model=qwen2_5_vl_7b", "model=qwen2_5_vl_7b: ivtp.bench makes prompts for LLaVA and LLaVA-NeXT"),
        ("model=tiny", "model=tiny: ivtp.bench makes prompts for LLaVA and LLaVA-NeXT"),
    ],
)
def test_what_cannot_be_benched_is_said_in_one_line(capsys, argument, said):
    assert main([argument]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and said in shown.err
    assert len(shown.err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, on which the suite would run")
def test_without_a_gpu_its_suite_says_so(capsys):
    assert main(["suite=gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_runs_alternate_and_contexts_are_not_timed():
    """A B B A: a machine that slows down must not make B look worse than A."""
    order: list[str] = []

    @contextmanager
    def inside():
        order.append("(")
        yield
        order.append(")")

    runs = {"a": Run(lambda: order.append("a"), inside), "b": Run(lambda: order.append("b"))}
    seconds = interleave(runs, 3, warmup=1)
    assert "".join(order) == "b(a)" + "(a)b" + "b(a)" + "(a)b"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_intervals_are_those_of_the_median():
    """Order statistics: beyond each end lies the true median in less than 2.5 % of all samples."""
    for n in (1, 2, 5, 6, 9, 25):
        values = [float((7 * i) % n) for i in range(n)]
        found = summary(values)
        low = found["interval"][0]
        outside = sum(math.comb(n, k) for k in range(int(low) + 1)) / 2**n
        assert outside < 0.025 or low == 0
        assert found["interval"] == [low, n - 1 - low]
    assert summary([float(i) for i in range(25)])["interval"] == [7.0, 17.0]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])["median"] == 2.0


def test_peak_memory_is_what_is_held_at_once():
    def two_then_one():
        a = torch.empty(1000, 250)
        b = torch.empty(1000, 250)
        del a, b
        return torch.empty(1000, 250)

    assert peak_bytes(two_then_one) == 2_000_000


def test_prompts_are_whole_and_nothing_is_padded(case):
    inputs, asked = prompts(case.model, 3, 29)
    shape = ivtp.shape_of(case.model)
    assert inputs["input_ids"].shape == (3, 29 + shape.tokens + shape.separators)
    assert (inputs["input_ids"][:, 0] == BOS).all()
    assert ((inputs["input_ids"] == IMAGE).sum(1) == shape.tokens + shape.separators).all()
    assert len(set(asked)) == 3


def test_batches_hold_the_same_prompts_in_every_order(case):
    """Another order that left words out, or images, would be faster for nothing."""
    held = {}
    for size, order in ((1, "as they come"), (3, "as they come"), (3, "sorted")):
        held[size, order] = []
        for inputs, asked in in_batches(prompts(case.model, 5, 29)[0], 29, size, order):
            mask = inputs["attention_mask"].bool()
            assert mask[:, -1].all() and mask[mask.sum(1).argmax()].all()
            assert [row.split()[-1] for row in asked] == [str(int(ids[-1])) for ids in inputs["input_ids"]]
            held[size, order] += [
                (ids[real].tolist(), pixels.sum().item())
                for ids, real, pixels in zip(inputs["input_ids"], mask, inputs["pixel_values"], strict=True)
            ]
    first, second, ordered = (sorted(found) for found in held.values())
    assert first == second == ordered
    lengths = [len(ids) for ids, _ in held[3, "sorted"]]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1


def test_what_is_timed_is_the_same_computation(case):
    """A loop that is fast because it computes something else would win every comparison."""
    runs = case.runs()
    with entered(runs["unpruned"]) as call:
        expected = call().logits
    assert expected.shape[1] == 1
    with entered(runs["none"]) as call:
        assert torch.equal(call().logits, expected)
    for name in ("ivtp", "random"):
        with entered(runs[name]) as call:
            assert not torch.equal(call().logits, expected)


def test_eager_maps_give_the_scores_that_ivtp_reads_and_leave_no_trace(case):
    """The adapter of what others do must do the same: the first cut of each site keeps the same tokens."""
    model, plan = case.model, case.plans["ivtp"]
    inputs, _ = prompts(model, case.batch, case.text)
    with torch.inference_mode(), eager_maps(model) as maps:
        eager = model(**inputs).logits
        rows = scores_from_maps(maps["vision"], plan.vision, 0)[0][:, 1:]
    with torch.inference_mode():
        close(eager, model(**inputs).logits)
        with ivtp.prune(model, ivtp.Plan(vision=ivtp.Stage(plan.vision.schedule.cuts[:1], PlainRollout()))) as run:
            model(**inputs)
    keep = plan.vision.schedule[0].keep
    chosen = rows.topk(keep, dim=1).indices.sort(dim=1).values
    assert torch.equal(chosen, run.trace.vision[0].position.sort(dim=1).values)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), eager_maps(model):
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "sdpa"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


class PlainRollout(ivtp.core.scores.Rollout):
    """Eq. 3 without Eq. 4, as the adapter multiplies maps."""

    def __init__(self) -> None:
        super().__init__(value_norm=False)


def test_promised_flops_are_those_of_the_run(case):
    """The head on the last position only, every sample counted; the scores are not part of the promise."""
    shape, plan = ivtp.shape_of(case.model), case.plans["ivtp"]
    promised = executed(shape, plan, case)
    with entered(case.runs()["ivtp"]) as call, flop_counter() as counter:
        call()
    read = len(prompts(case.model, 1, case.text)[1][0].split()) + 2
    scores = case.batch * cost(shape, plan, case.text, read, streamed=True).pruner
    assert counter.get_total_flops() == sum(promised.values()) + scores


def test_the_cache_is_counted(case):
    for name in ("none", "ivtp"):
        found = cache_bytes(case, name)
        assert found["found"] == found["closed"] > 0
    assert cache_bytes(case, "ivtp")["found"] < cache_bytes(case, "none")["found"]


def test_the_rest_is_what_flops_do_not_explain():
    """Half the FLOPs in three quarters of the time: a quarter is unexplained; what only pruning does is so entirely."""
    flops = {"none": dict.fromkeys(("vision", "projector", "language"), 4)}
    flops["ivtp"] = dict.fromkeys(flops["none"], 2)
    every = ("vision", "projector", "language", "text_encoder", "score", "pruner", "rest")
    none = dict.fromkeys(every, 0.0) | {"vision": 4.0, "language": 4.0}
    pruned = none | {"vision": 3.0, "language": 2.0, "score": 1.0}
    found = rest({"none": none, "ivtp": pruned}, flops, 10.0)
    assert found == dict.fromkeys(every, 0.0) | {"vision": 0.1, "score": 0.1}


def test_a_record_of_a_case_names_all_parts(case):
    record = measure(case, 1, {"flops": 1e9, "bytes": 1e9})
    assert set(record["parts"]["ivtp"]) == set(record["rest"])
    assert record["parts"]["ivtp"]["score"] > 0 == record["parts"]["none"]["score"]
    # Nothing is twice as fast as a machine without losses on the FLOPs alone says, where all parts are bound by them.
    assert record["speedup_of_roofline"] > 1


def test_rollout_from_dense_maps_is_the_same():
    found = rollout_over_dense("cpu", torch.float32, 1, n=67, heads=3, width=8, layers=4)
    assert found["difference"] < 1e-6
    assert found["memory"] > 1


def test_every_token_of_an_answer_has_its_time(case):
    """With the prompt's time among those of the tokens, pruning would seem to make generation faster."""
    inputs, _ = prompts(case.model, case.batch, case.text)
    waited: list[int] = []
    clock = TokenTimes(lambda: waited.append(len(clock.times)))
    found = case.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, stopping_criteria=[clock])
    assert found.shape[1] == inputs["input_ids"].shape[1] + 3
    assert waited == [1, 2, 3] and len(clock.times) == 4
    assert clock.times == sorted(clock.times)


@pytest.mark.skipif(missing_kvpress() is not None, reason=str(missing_kvpress()))
def test_kvpress_leaves_a_cache_as_large_as_ours(case):
    """Its row would compare another budget; on prompts shorter than its window it would not run at all."""
    with entered(snapkv(case)) as call:
        found = kv_bytes(call())
    ours = cache_bytes(case, "ivtp")["closed"]
    assert abs(found - ours) < 0.05 * ours


def test_the_pipeline_is_timed_on_the_loop_of_a_run():
    """Every photograph is decoded, prepared and answered once in each loop, and the step waits as long as it says."""
    load = Load(images=5, batch=2, wait=0.01, workers=(0, 2))
    record = run_pipeline(1, None, lambda line: None, load)
    for part in record["pipeline"].values():
        assert set(part["images_per_second"]) == {"model", "0", "2"}
        assert part["images_per_second"]["model"] <= 100
        assert all(0 < over["median"] < 1.1 for over in part["over_model"].values())
    assert {row[0] for row in tables(record)[1].lines} == {"clip", "llava_next"}
    with pytest.raises(UserError, match="model=llava_next_7b: suite=pipeline times the processors"):
        run_pipeline(1, "llava_next_7b", lambda line: None)


def test_processors_are_those_of_the_models(tmp_path):
    write_photographs(tmp_path, 1)
    photo = Image.open(tmp_path / "0.jpg")
    assert photo.size == (640, 480) and 50_000 < (tmp_path / "0.jpg").stat().st_size < 250_000
    for size, shape in ((LLAVA_7B, (1, 3, 336, 336)), (LLAVA_NEXT_7B, (1, 5, 3, 336, 336))):
        inputs = processor_of(size)(images=photo, text="<image> 20", return_tensors="pt")
        assert inputs["pixel_values"].shape == shape
        assert 570 < (inputs["input_ids"] == IMAGE).sum() < 2900


@pytest.mark.parametrize(("name", "keep"), [("llava_1_5_13b", 64), ("llava_next_7b", 320)])
def test_a_suite_takes_the_sizes_of_a_model_config(name, keep):
    """Times of a 13B model beside the FLOPs of a 7B one would promise what cannot be."""
    suite = with_model(SUITES["gpu"], name)
    (group,) = suite.cases
    assert group.keep == suite.batches.keep == keep and suite.batches.size is group.size
    found = ivtp.shape_of(group.size.config())
    expected = build_shape(load_config([f"model={name}"]))
    assert (found.vision, found.language, found.tokens) == (expected.vision, expected.language, expected.tokens)
