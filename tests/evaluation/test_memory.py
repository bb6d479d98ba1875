"""When memory does not suffice, the batch is halved and the row goes on; no result depends on it."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.running import lines, one_line, outcomes, run

from ivtp.data.batches import Batch
from ivtp.data.datamodule import QuestionData
from ivtp.data.failures import out_of_memory
from ivtp.evaluation.isolated import Isolated

EMOJI = ("model=tiny_clip", "data=emoji", "data.size=4", "data.background=photo", "pruner=layerwise")


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_did_not_suffice(error, is_so):
    assert out_of_memory(error) is is_so


class Model(Isolated):
    """A device whose memory holds so many samples; batch sizes that it was given, and lines that were printed."""

    def __init__(self, most: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__(lambda samples: Batch({"x": torch.zeros(len(samples))}, samples))
        self.limit, self.error, self.given, self.said = most, error, [], []
        self.say = self.said.append

    def outcomes(self, batch):
        self.given.append(len(batch.samples))
        if len(batch.samples) > self.limit:
            raise self.error("CUDA out of memory")
        return [{"id": sample["id"], "correct": True} for sample in batch.samples]

    def run(self, count: int, inputs: bool = True) -> list[dict]:
        samples = [{"id": str(i), "question": "", "answer": "", "family": "", "images": []} for i in range(count)]
        batch = Batch({"x": torch.zeros(count)} if inputs else {}, samples)
        return self.test_step(batch, 0)["outcomes"]


def test_halving_goes_down_to_one_and_a_sample_that_does_not_fit_alone_fails_alone():
    model = Model(0)
    lost = model.run(3)
    assert [outcome["cause"] for outcome in lost] == ["out of memory"] * 3
    assert model.given[:3] == [3, 2, 1] and model.said[:2] == [
        "out of memory: going on with trainer.batch_size=2",
        "out of memory: going on with trainer.batch_size=1",
    ]


def test_the_batch_stays_small_and_is_printed_once():
    """Nobody leaves the loop: every sample of the batch has its outcome when the step ends, and in order."""
    model = Model(3)
    for _ in range(2):
        assert [outcome["id"] for outcome in model.run(11)] == [str(i) for i in range(11)]
    assert model.given == [11, 6, 3, 3, 3, 2, 3, 3, 3, 2] and len(model.said) == 2


def test_a_batch_whose_inputs_do_not_fit_is_collated_again_in_parts():
    class Full(torch.Tensor):
        def to(self, *_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

    batch = Batch({"x": torch.zeros(2).as_subclass(Full)}, [{}, {}])
    moved = QuestionData.transfer_batch_to_device(None, batch, "cpu", 0)
    assert moved.inputs == {} and moved.samples == batch.samples
    model = Model(9)
    assert len(model.run(4, inputs=False)) == 4
    assert model.given == [2, 2] and model.said == ["out of memory: going on with trainer.batch_size=2"]


def test_other_errors_are_not_taken_for_it():
    model = Model(0, AttributeError)
    with pytest.raises(AttributeError):
        model.run(4)
    assert model.given == [4] and not model.said


def limited(monkeypatch, most: int) -> list[int]:
    """The embedded CLIP on a device whose memory holds so many images: every batch size that it was given."""
    from ivtp.backbones.loading.encoders import Encoder

    given, logits = [], Encoder.logits

    def forward(self, pixels):
        given.append(len(pixels))
        if len(pixels) > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory with {len(pixels)} images")
        return logits(self, pixels)

    monkeypatch.setattr(Encoder, "logits", forward)
    return given


def test_a_row_goes_on_with_half_of_the_batch_and_its_results_are_the_same(tmp_path, monkeypatch, capsys):
    """The record says with which batch it ended; a later row starts with that one."""
    assert run(*EMOJI, output=tmp_path / "whole") == 0
    given = limited(monkeypatch, 4)
    assert run(*EMOJI, "trainer.batch_size=13", output=tmp_path / "halved") == 0
    out = capsys.readouterr().out
    assert len(re.findall("out of memory: going on with trainer.batch_size", out)) == 2
    assert given[:3] == [13, 7, 4] and given.count(13) == 1
    records = lines(tmp_path / "halved" / "run" / "results.jsonl")
    assert [record["speed"]["batch_size"] for record in records] == [4, 4]
    for record, before in zip(records, lines(tmp_path / "whole" / "run" / "results.jsonl"), strict=True):
        assert record["metrics"] == before["metrics"]
        halved, whole = (outcomes(tmp_path / name / "run", r) for name, r in (("halved", record), ("whole", before)))
        assert halved == whole and len(whole) == 20


def test_a_model_that_does_not_fit_at_all_ends_in_one_line(tmp_path, monkeypatch, capsys):
    limited(monkeypatch, 0)
    assert run(*EMOJI, "trainer.batch_size=3", output=tmp_path) == 2
    assert "none of the first 9 samples can be evaluated" in (line := one_line(capsys.readouterr().err))
    assert "model.dtype=bfloat16" in line
