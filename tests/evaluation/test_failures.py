"""One bad sample never ends a run: it is an outcome with its reason, and nobody else's result changes."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable

import pytest
import torch
from helpers.running import lines, one_line, outcomes, run

from ivtp import load_model, shape_of
from ivtp.backbones.loading.encoders import Encoder
from ivtp.data.batches import SafeCollate
from ivtp.data.datamodule import Collate, QuestionData
from ivtp.data.failures import Failed, answered, failure, failures, own, read
from ivtp.data.questions import DataError
from ivtp.data.scenes2 import Scenes2
from ivtp.evaluation.answering import JUDGE_FAILURES, Answer, FiniteLogits
from ivtp.evaluation.isolated import check_device, check_workers
from ivtp.evaluation.statistics import compare, over_seeds, spread
from ivtp.evaluation.task_metrics import measured
from ivtp.lmms.judges import JudgeError
from ivtp.pruners.planner import Planner
from ivtp.registry import UserError
from ivtp.signals import STOPPING

EMOJI = ("model=tiny_clip", "data=emoji", "data.size=4", "data.background=photo", "pruner=layerwise", "viewer=1")
STYLES = ("noto-v1", "fluent-flat", "fluent-3d", "emojione", "twemoji")  # the default of data=emoji
PROMPT = "<image> {question}"


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The folder of a run in which nothing fails."""
    output = tmp_path_factory.mktemp("healthy")
    assert run(*EMOJI, output=output) == 0
    return output / "run"


def evaluate(
    model, processor, samples, collate=None, plan="topk", size: int = 4, tokens: int = 1, **more
) -> list[dict]:
    """The outcomes of samples under a plan, in the order of the data."""
    collate = collate or Collate(processor, PROMPT)
    data = QuestionData(samples, collate, size)
    found: list[dict] = []
    planner = plan if isinstance(plan, Planner) else Planner(plan, shape_of(model), {"keep": 16})
    module = Answer(model, processor, planner, generation={"max_new_tokens": tokens}, collate=collate, **more)
    with torch.inference_mode():
        for index, batch in enumerate(data.test_dataloader()):
            found += module.test_step(batch, index)["outcomes"]
    return found


# Which errors are a sample's own ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_own"),
    [
        (DataError("sample 'a': cannot be read"), True),
        (ValueError("keep=3"), True),
        (RuntimeError("shapes"), True),
        (OSError(5, "Input/output error"), True),
        (MemoryError(), True),
        (KeyError("answer"), True),
        (UserError("there is no text encoder"), False),
        (AttributeError("no attribute"), False),
        (TypeError("missing argument"), False),
        (NameError("nme"), False),
        (AssertionError(), False),
        (KeyboardInterrupt(), False),
        (SystemExit(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_program_and_requests_that_cannot_be_met_are_not_a_sample_s(error, is_own):
    assert own(error) is is_own
    if not is_own:
        with pytest.raises(type(error)):
            failure({"id": "a"}, error, "cannot be read")


def test_a_reason_is_one_short_line_and_says_where():
    try:
        raise RuntimeError("first\n\x1b[31msecond " + 1000 * "x")
    except RuntimeError as error:
        found = failure({"id": "a"}, error, "cannot be answered")
    assert found.reason.startswith("RuntimeError: first \\x1b[31msecond x") and len(found.reason) < 450
    assert found.where.startswith("test_failures.py:")
    named = failure({"id": "a\n"}, DataError("sample 'a\\n': it is empty"), "cannot be read")
    assert named.reason == "it is empty", "its id stands beside it"


def test_an_error_after_which_a_gpu_is_lost_ends_the_run_in_one_line():
    broken = torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ...")
    for error in (broken, RuntimeError("CUDA error: an illegal memory access was encountered")):
        with pytest.raises(UserError, match=r"the device failed \(CUDA error: .*; the same command goes on") as raised:
            check_device(error)
        assert "\n" not in str(raised.value)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        ValueError(),
    ):
        check_device(error)


def test_a_worker_that_ends_while_the_model_works_is_no_fault_of_the_batch_in_flight():
    """torch raises it wherever the main process is."""
    with pytest.raises(
        UserError, match=r"^DataLoader worker \(pid 7\) is killed by signal: Killed; the same command goes"
    ):
        check_workers(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"))
    check_workers(RuntimeError("CUDA out of memory"))


# Reading and preparing ----------------------------------------------------------------------------------------------


class Spoilt(Scenes2):
    """Scenes of which some cannot be read or asked; texts are known without opening an image."""

    def __init__(self, scenes: int, spoilt: dict[int, Exception], questions: dict[int, str] | None = None) -> None:
        super().__init__("test", scenes)
        self.spoilt, self.questions = spoilt, questions or {}

    def texts(self, place: int) -> dict:
        return {name: each for name, each in super().__getitem__(place).items() if name not in ("image", "patches")}

    def __getitem__(self, place: int) -> dict:
        if place in self.spoilt:
            raise self.spoilt[place]
        sample = super().__getitem__(place)
        return sample | {"question": self.questions.get(place, sample["question"])}


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_others_of_a_batch_do_not_notice(tiny, size):
    """Whatever the batch, healthy samples have the outcomes of a run without bad ones."""
    bad = {1: DataError("no image"), 6: OSError(5, "Input/output error")}
    asked = {2: " ", 9: "half \ud83d of a pair"}
    found = {o["id"]: o for o in evaluate(*tiny, Spoilt(2, bad, asked), size=size)}
    whole = {o["id"]: o for o in evaluate(*tiny, Scenes2("test", 2), size=4)}
    names = list(whole)
    assert set(found) == set(whole)
    lost = {name for name, outcome in found.items() if "failed" in outcome}
    assert lost == {names[i] for i in (1, 2, 6, 9)}
    assert all(found[name] == whole[name] for name in set(whole) - lost)
    causes = [found[names[i]]["cause"] for i in (1, 2, 6, 9)]
    assert causes == ["cannot be read", "cannot be prepared", "cannot be read", "cannot be prepared"]
    assert found[names[1]]["failed"] == "no image" and "Input/output error" in found[names[6]]["failed"]
    for name in lost:
        assert found[name]["correct"] is None and found[name]["prediction"] is None
        assert {key: found[name][key] for key in ("family", "image")} == {
            k: whole[name][k] for k in ("family", "image")
        }


def test_an_error_of_the_whole_batch_is_not_blamed_on_its_samples():
    def collate(samples):
        if len(samples) > 1:
            raise ValueError("together they cannot be stacked")

    with pytest.raises(ValueError, match="cannot be stacked"):
        SafeCollate(collate)([{"id": "a"}, {"id": "b"}])


def test_a_bug_in_reading_is_not_hidden():
    data = Spoilt(1, {2: AttributeError("a typo")})
    assert not isinstance(read(data, 0), Failed)
    with pytest.raises(AttributeError, match="a typo"):
        read(data, 2)


def test_the_hash_of_healthy_data_stays_and_that_of_bad_data_does_not_depend_on_the_reason(tiny):
    """Results of healthy data are found again; a file that was mended is read again."""
    collate = Collate(tiny[1], PROMPT)

    def survey(data):
        return QuestionData(data, collate, 4).survey

    assert survey(Scenes2("test", 4)).hash == "adc6f623d425dc00"
    bad = [survey(Spoilt(4, {3: error})) for error in (DataError("no file"), OSError(13, "Permission denied"))]
    assert bad[0].hash == bad[1].hash != "adc6f623d425dc00"
    assert bad[0].hash != survey(Spoilt(4, {4: DataError("no file")})).hash
    assert [*bad[0].failed] == [3] and bad[0].ids == survey(Scenes2("test", 4)).ids
    assert survey(Spoilt(4, {})).hash == "adc6f623d425dc00"


def test_sorted_data_leaves_out_what_is_known_to_fail(tiny):
    data = QuestionData(Spoilt(2, {3: DataError("no file")}), Collate(tiny[1], PROMPT), 4, sort=True)
    asked = [sample["id"] for batch in data.test_dataloader() for sample in batch.samples]
    assert sorted(asked) == sorted(name for i, name in enumerate(data.survey.ids) if i != 3)


# Planning, the model, judging ---------------------------------------------------------------------------------------


def test_an_image_that_cannot_meet_the_budget_fails_alone():
    """keep=4 tokens cannot be spread over five crops, but over three; every image of a batch has its own."""
    from helpers.families import FAMILIES, TEXTS, family, photo

    assert "llava_next" in FAMILIES
    model, processor, image = family("llava_next")
    sizes = [(35, 70), (70, 70), (35, 70), (70, 70), (70, 35)]
    nowhere = torch.zeros(25, dtype=torch.bool)
    samples = [
        {"id": str(i), "image": photo(*size, i), "question": TEXTS[i % 3], "answer": "red", "family": "all"}
        | {"patches": nowhere}
        for i, size in enumerate(sizes)
    ]
    collate = Collate(processor, f"{image} {{question}}")
    plan = Planner("topk", shape_of(model, (35, 70)), {"keep": 4})
    found = {o["id"]: o for o in evaluate(model, processor, samples, collate, plan, size=5)}
    assert {name for name, o in found.items() if "failed" in o} == {"1", "3"}
    assert "5 crops" in found["1"]["failed"] and found["1"]["cause"] == "cannot be answered"
    alone = {o["id"]: o for o in evaluate(model, processor, [samples[i] for i in (0, 2, 4)], collate, plan, size=1)}
    assert all(found[name] == outcome for name, outcome in alone.items())


def test_an_answer_that_cannot_be_scored_is_kept(tiny):
    names = [sample["id"] for sample in map(Scenes2("test", 1).__getitem__, range(5))]

    def scorer(sample, text):
        if sample["id"] == names[2]:
            raise DataError("the task cannot read it")
        return {"answer": sample["answer"], "prediction": text, "correct": True}

    found = evaluate(*tiny, Scenes2("test", 1), scorer=scorer, size=5)
    assert [o["correct"] for o in found] == [None if i == 2 else True for i in range(8)]
    assert found[2]["failed"] == "the task cannot read it" and found[2]["prediction"]


def test_a_judge_that_is_down_ends_the_run_and_one_that_fails_now_and_then_does_not(tiny):
    calls = []

    def scorer(sample, text, works: Callable[[int], bool]):
        calls.append(sample["id"])
        if not works(len(calls)):
            raise JudgeError("the judge failed: 429")
        return {"answer": sample["answer"], "prediction": text, "correct": True}

    found = evaluate(*tiny, Scenes2("test", 2), scorer=lambda s, t: scorer(s, t, lambda n: n % 4 == 0), tokens=2)
    assert len(failures(found)) == 12 and len(answered(found)) == 4
    calls.clear()
    with pytest.raises(UserError, match="429; the same command goes on"):
        evaluate(*tiny, Scenes2("test", 4), scorer=lambda s, t: scorer(s, t, lambda n: False), tokens=2)
    assert len(calls) == JUDGE_FAILURES


def test_a_bug_in_judging_is_not_hidden(tiny):
    with pytest.raises(AttributeError):
        evaluate(*tiny, Scenes2("test", 1), scorer=lambda sample, text: sample.nothing)


def test_an_answer_out_of_numbers_that_are_not_finite_is_not_scored_as_wrong(tiny):
    """A weight that overflows for one word: only the prompt with this word fails, in any batch."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    samples = [Scenes2("test", 1)[i] for i in range(5)]
    asked = ["is there a red circle ?", "is there a green circle ?"]
    samples = [s | {"question": asked[i == 3]} for i, s in enumerate(samples)]
    whole = evaluate(model, processor, samples)
    word = processor.tokenizer(" green", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = torch.inf
    for size in (1, 5):
        found = evaluate(model, processor, samples, size=size)
        assert [i for i, o in enumerate(found) if "failed" in o] == [3]
        assert found[3]["cause"] == "not finite" and "float32" in found[3]["failed"]
        assert [o for i, o in enumerate(found) if i != 3] == [o for i, o in enumerate(whole) if i != 3]


def test_logits_count_until_the_answer_ends_and_forbidden_words_are_no_failure(tiny):
    watch = FiniteLogits(tiny[0], 3)
    end = int(watch.end[0])
    scores = torch.zeros(4, 9)
    scores[0, :8] = -torch.inf  # what `min_new_tokens` and its like do
    assert watch(torch.ones(4, 3, dtype=torch.long), scores) is scores
    assert watch.failed.tolist() == [False] * 4
    scores = torch.zeros(4, 9)
    scores[1, 5], scores[2, 5], scores[3, 2] = torch.nan, torch.inf, torch.nan
    ids = torch.ones(4, 5, dtype=torch.long) + end
    ids[3, 3] = end  # this answer is over; what follows is padding
    watch(ids, scores)
    assert watch.failed.tolist() == [False, True, True, False]
    watch(ids, torch.zeros(4, 9))
    assert watch.failed.tolist() == [False, True, True, False]


# Whole runs ---------------------------------------------------------------------------------------------------------


def breaking(monkeypatch, pixels: Callable[[torch.Tensor], torch.Tensor], error: Callable[[], Exception] | None):
    """The embedded CLIP on which images fail by their pixels; batch sizes that it was given. No error: NaN comes out."""
    given, logits = [], Encoder.logits

    def forward(self, images):
        given.append(len(images))
        bad = pixels(images)
        if error is not None and bad.any():
            raise error()
        found = logits(self, images)
        return found if error is not None else found.masked_fill(bad[:, None], torch.nan)

    monkeypatch.setattr(Encoder, "logits", forward)
    return given


def images_of(*places: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Which images of a batch are those of the emoji at these places."""
    from ivtp.backbones.loading.encoders import load_encoder
    from ivtp.data.images import emoji

    data, prepare = emoji(324, STYLES, 4, "photo"), load_encoder("transformers", "tiny_clip").image_processor
    known = prepare(images=[data[place]["image"] for place in places], return_tensors="pt")["pixel_values"]
    return lambda pixels: (pixels[:, None] - known).abs().amax((2, 3, 4)).lt(1e-6).any(1)


def signalling(place: int, *signals: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """No image of a batch is bad, but signals arrive while this one is evaluated."""
    here = images_of(place)

    def pixels(given: torch.Tensor) -> torch.Tensor:
        if here(given).any():
            for number in signals:
                os.kill(os.getpid(), number)
        return torch.zeros(len(given), dtype=torch.bool)

    return pixels


def record_of(output) -> dict:
    return lines(output / "run" / "results.jsonl")[-1]


def test_a_sample_that_does_not_fit_into_memory_alone_leaves_the_batch_as_it_is(healthy, tmp_path, monkeypatch, capsys):
    given = breaking(monkeypatch, images_of(5), lambda: torch.OutOfMemoryError("CUDA out of memory"))
    assert run(*EMOJI, "trainer.batch_size=8", output=tmp_path) == 0
    said = capsys.readouterr().out
    assert "does not fit into memory alone (" in said and "going on with trainer.batch_size=8" in said
    assert given[:4] == [8, 4, 4, 2] and 8 in given[4:], "the others go on in batches of eight"
    records = lines(tmp_path / "run" / "results.jsonl")
    for record, before in zip(records, lines(healthy / "results.jsonl"), strict=True):
        assert record["speed"]["batch_size"] == 8
        assert record["failed"] == {"n": 1, "causes": {"out of memory": 1}}
        found, whole = outcomes(tmp_path / "run", record), outcomes(healthy, before)
        (lost,) = failures(found)
        assert "image of 186 × 186 pixels: OutOfMemoryError: CUDA out of memory" in lost["failed"]
        assert answered(found) == [outcome for outcome in whole if outcome["id"] != lost["id"]]
        assert record["metrics"]["accuracy"]["n"] == 19


def test_failures_are_shown_and_tried_again_and_a_mended_run_is_the_healthy_one(healthy, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        breaking(broken, images_of(0, 7), None)
        assert run(*EMOJI, output=tmp_path) == 0
    said = capsys.readouterr()
    assert "2 of 20 samples failed (2 not finite) and are left out of every number" in said.out and not said.err
    folder = tmp_path / "run"
    table = (folder / "table.md").read_text()
    assert "| failed |" in table and "## Failed samples" in table and table.count("logits are NaN or infinite") == 2
    page = (folder / "report.html").read_text()
    assert "A or B failed" in page and page.count("logits are NaN or infinite") > 2
    comparisons = json.loads((folder / "comparisons.json").read_text())
    assert comparisons["layerwise"]["unpruned"]["n"] == 18
    before = (folder / "results.jsonl").read_bytes()

    # Nothing has changed: the samples fail again, and nothing is written.
    with monkeypatch.context() as broken:
        given = breaking(broken, images_of(0, 7), None)
        assert run(*EMOJI, output=tmp_path) == 0
    assert given == [2, 2] and (folder / "results.jsonl").read_bytes() == before

    # Mended, only they are evaluated, and all is as if they had never failed.
    given = breaking(monkeypatch, lambda pixels: torch.zeros(len(pixels), dtype=torch.bool), None)
    assert run(*EMOJI, output=tmp_path) == 0
    assert given == [2, 2]
    for record, whole in zip(lines(folder / "results.jsonl")[2:], lines(healthy / "results.jsonl"), strict=True):
        assert record["metrics"] == whole["metrics"] and "failed" not in record
        path = f"outcomes/{record['key']}.jsonl"
        assert (folder / path).read_bytes() == (healthy / path).read_bytes()
    assert "failed" not in (folder / "table.md").read_text()
    assert len(record["speed"]["questions_per_second"].hex()) > 3, "of the whole row, not of two samples"


def test_a_row_in_which_nothing_works_ends_the_run_early(tmp_path, monkeypatch, capsys):
    given = breaking(monkeypatch, lambda pixels: torch.ones(len(pixels), dtype=torch.bool), None)
    assert run(*EMOJI, "model.dtype=float32", "trainer.batch_size=5", output=tmp_path) == 2
    line = one_line(capsys.readouterr().err)
    assert "row 'unpruned': none of the first 10 samples can be evaluated; the first not finite: logits are NaN" in line
    assert given == [5, 5, 1], "two batches and the last sample"
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_bad_samples_at_the_start_do_not_end_it(tmp_path, monkeypatch):
    breaking(monkeypatch, images_of(*range(9)), lambda: ValueError("no"))
    assert run(*EMOJI, output=tmp_path) == 0
    assert record_of(tmp_path)["failed"]["n"] == 9 and record_of(tmp_path)["metrics"]["accuracy"]["n"] == 11


def test_a_bug_ends_the_run_as_it_always_did(tmp_path, monkeypatch):
    breaking(monkeypatch, images_of(5), lambda: AttributeError("a typo"))
    with pytest.raises(AttributeError, match="a typo"):
        run(*EMOJI, output=tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda sent: sent.name)
def test_a_signal_ends_it_after_the_batch_in_one_line_and_the_next_start_goes_on(
    healthy, tmp_path, monkeypatch, capsys, sent
):
    """Ctrl-C, schedulers, and a terminal that is closed; schedulers go by the status."""
    before = [signal.getsignal(number) for number in STOPPING]
    with monkeypatch.context() as stopped:
        breaking(stopped, signalling(8, sent), None)
        assert run(*EMOJI, "trainer.batch_size=6", output=tmp_path) == 128 + sent
    assert capsys.readouterr().err == "ivtp: stopped; the same command goes on from here\n"
    assert [signal.getsignal(number) for number in STOPPING] == before
    given = breaking(monkeypatch, lambda pixels: torch.zeros(len(pixels), dtype=torch.bool), None)
    assert run(*EMOJI, "trainer.batch_size=6", output=tmp_path) == 0
    assert given[:3] == [6, 2, 6], "twelve were done, the batch in flight too"
    assert record_of(tmp_path)["metrics"] == lines(healthy / "results.jsonl")[-1]["metrics"]


def test_a_second_signal_does_not_wait_for_the_batch(healthy, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as stopped:
        breaking(stopped, signalling(8, signal.SIGTERM, signal.SIGINT), None)
        assert run(*EMOJI, "trainer.batch_size=6", output=tmp_path) == 128 + signal.SIGINT
    given = breaking(monkeypatch, lambda pixels: torch.zeros(len(pixels), dtype=torch.bool), None)
    assert run(*EMOJI, "trainer.batch_size=6", output=tmp_path) == 0
    assert given[:4] == [6, 6, 2, 6], "six were done"
    assert capsys.readouterr().err == "ivtp: stopped; the same command goes on from here\n"
    assert record_of(tmp_path)["metrics"] == lines(healthy / "results.jsonl")[-1]["metrics"]


def test_an_unreadable_image_of_a_class_folder_fails_alone(tmp_path, capsys):
    from ivtp.data.images import emoji

    data = emoji(324, STYLES, 4, "photo")
    for place in range(12):
        sample = data[place]
        (tmp_path / "images" / sample["answer"]).mkdir(parents=True, exist_ok=True)
        sample["image"].save(tmp_path / "images" / sample["answer"] / f"{place}.png")
    first = sorted((tmp_path / "images").glob("*/*.png"))[0]
    first.write_bytes(first.read_bytes()[:100])
    rows = f"data.path={tmp_path / 'images'}", "pruner=group_mean", "viewer=2"
    assert run("model=tiny_clip", "data=imagefolder", *rows, output=tmp_path) == 0
    assert record_of(tmp_path)["failed"] == {"n": 1, "causes": {"cannot be read": 1}}
    (lost,) = failures(outcomes(tmp_path / "run", record_of(tmp_path)))
    assert lost["id"] == first.relative_to(tmp_path / "images").as_posix() and "cannot be read" in lost["failed"]


def test_a_measured_row_counts_on_a_sample_that_works(tmp_path, monkeypatch):
    breaking(monkeypatch, images_of(0), lambda: ValueError("no"))
    assert run(*EMOJI, "measure=true", "data.limit=3", output=tmp_path) == 0
    assert record_of(tmp_path)["counted"]["closed"] == record_of(tmp_path)["counted"]["counted"]


# Numbers ------------------------------------------------------------------------------------------------------------


def outcome(name: str, correct: bool, **more) -> dict:
    return {"id": name, "image": name, "family": "all", "prediction": str(correct), "correct": correct} | {
        **dict.fromkeys(("early_correct", "target_hit", "target_share")),
        **more,
    }


def test_a_sample_that_failed_in_either_row_or_seed_is_in_no_pair():
    ours = [outcome("1", True), outcome("2", True), outcome("3", False)]
    assert compare(ours, ours[1:])["n"] == 2
    merged = over_seeds([ours, ours[:2]])
    assert [(o["id"], o["predictions"]) for o in merged] == [("1", ["True", "True"]), ("2", ["True", "True"])]
    metric = {"mean": 0.5, "se": 0.1, "n": 2}
    merged = spread([{"accuracy": metric, "accuracy/a": metric}, {"accuracy": metric}])
    assert merged["accuracy/a"]["mean"] == 0.5, "a family whose questions all failed under one seed"


def test_a_metric_of_pairs_leaves_the_image_of_a_failed_question_out():
    """MME counts both questions about an image: one that failed takes the other along, and the rest is counted."""
    from ivtp.lmms.dataset import Score

    def pairs(values):
        names = [name for name, _ in values]
        if any(names.count(name) != 2 for name in names):
            raise DataError("only pairs")
        return sum(right for _, right in values) / len(values)

    values = [("a", 1), ("b", 1), ("b", 0), ("c", 1), ("c", 1)]
    score = Score("mme/score", values, None, [name for name, _ in values], pairs, False, True)
    with pytest.raises(DataError, match="only pairs"):
        measured([score])
    found = measured([score], {"a"})
    assert found["mme/score"]["mean"] == 0.75 and found["score"]["n"] == 4
    with pytest.raises(DataError, match="only pairs"):
        measured([score], {"a", "b", "c"})


def test_a_viewer_image_that_cannot_be_shown_is_left_out(tiny, tmp_path):
    from ivtp.report import viewer

    data = Spoilt(3, {0: DataError("no file"), 9: DataError("no file")})
    names = viewer.save(tmp_path, data, tiny[1], 2)
    assert len(names) == 14 and len(list((tmp_path / "viewer").glob("*.webp"))) == 2
