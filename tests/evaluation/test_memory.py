"""When memory does not suffice, the batch is halved and the row goes on; no result depends on it."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.running import lines, outcomes, run

from ivtp.evaluation.isolated import halving, out_of_memory
from ivtp.registry import UserError

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


def test_halving_goes_down_to_one_and_then_says_what_to_do():
    sizes, said = [], []

    def run(size):
        sizes.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"one sample at a time.*model.dtype=bfloat16") as raised:
        halving(run, 11, said.append)
    assert sizes == [11, 6, 3, 2, 1] and "\n" not in str(raised.value)
    assert said[-1] == "out of memory: going on with trainer.batch_size=1"


def test_other_errors_are_not_held_back():
    def run(size):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        halving(run, 8, print)


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
    assert capsys.readouterr().err.count("\n") == 1
