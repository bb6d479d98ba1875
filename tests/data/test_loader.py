"""Batches from worker processes and from the cache on disk are those of the main process, and so are their errors."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import time
from multiprocessing import active_children

import pytest
import torch
from helpers.running import run
from PIL import Image

from ivtp import load_model
from ivtp.data import loader as workers
from ivtp.data import questions
from ivtp.data.batch_cache import BatchCache
from ivtp.data.batches import Batch, Prepare
from ivtp.data.datamodule import Collate, QuestionData
from ivtp.data.failures import DataError
from ivtp.data.loader import default_workers
from ivtp.registry import UserError

COUNT = 10


class Photos:
    """Photographs of several sizes with a question each; some raise an error, or wait, or end their process."""

    def __init__(self, broken: dict | None = None) -> None:
        self.broken, self.opened = broken or {}, 0

    def __len__(self) -> int:
        return COUNT

    def texts(self, index: int) -> dict:
        patches = torch.zeros(324, dtype=torch.bool)
        patches[index] = True
        return {
            "id": f"photo {index}",
            "question": "what " * (1 + index % 3),
            "answer": "a",
            "family": "all",
            "patches": patches,
        }

    def sketch(self, index: int) -> tuple[dict, bytes]:
        return self.texts(index) | {"sizes": [(40 + index, 30)]}, bytes([index])

    def __getitem__(self, index: int) -> dict:
        self.opened += 1
        if index in self.broken:
            self.broken[index]()
        return self.texts(index) | {"image": Image.new("RGB", (40 + index, 30), (9 * index, 0, 200))}


def raising(error: Exception):
    def broken():
        raise error

    return broken


@pytest.fixture(scope="module")
def collate():
    return Collate(load_model("tiny")[1], "<image> {question}")


def module(collate, processes: int = 0, broken: dict | None = None, cache: BatchCache | None = None, size: int = 3):
    data = QuestionData(Photos(broken), collate, size)
    data.workers, data.cache = processes, cache
    return data


def equal(one: list[Batch], other: list[Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        assert [sample["id"] for sample in a.samples] == [sample["id"] for sample in b.samples]
        assert [sample["image"].size for sample in a.samples] == [sample["image"].size for sample in b.samples]
        assert all(torch.equal(x["patches"], y["patches"]) for x, y in zip(a.samples, b.samples, strict=True))
        assert [failed.outcome() for failed in a.failed] == [failed.outcome() for failed in b.failed]


def test_workers_change_neither_batches_nor_their_order_nor_failures(collate):
    """A failed sample is the same outcome wherever it was read."""
    broken = {4: raising(DataError("sample 'photo 4': no file")), 6: raising(OSError(5, "Input/output error"))}
    here = list(module(collate, 0, broken).test_dataloader())
    there = list(module(collate, 2, broken).test_dataloader())
    equal(here, there)
    assert [len(batch.samples) for batch in there] == [3, 2, 2, 1]
    # Pixels of photographs stay in the worker: sending them would take longer than the inputs made of them.
    assert isinstance(here[0].samples[0]["image"], Image.Image) and not isinstance(
        there[0].samples[0]["image"], Image.Image
    )


def test_samples_travel_without_files_of_their_own(collate):
    """torch opens a file for each tensor that it sends: some thousands would be too many for the system."""
    from multiprocessing.reduction import ForkingPickler

    (batch, *_) = module(collate).test_dataloader()
    bare = Batch({}, batch.samples, batch.failed)
    files = len(os.listdir("/proc/self/fd"))
    sent = [bytes(ForkingPickler.dumps(bare)) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == files
    equal([Batch(batch.inputs, pickle.loads(sent[0]).samples)], [batch])
    assert len(sent[0]) < 5000, "no pixels"


def test_a_bug_in_a_worker_names_its_sample_as_in_the_main_process(collate):
    broken = {4: raising(AttributeError("a typo"))}
    with pytest.raises(AttributeError, match="a typo") as here:
        list(module(collate, 0, broken).test_dataloader())
    assert here.value.__notes__ == ["sample 'photo 4' cannot be read"]
    with pytest.raises(AttributeError, match="a typo\nsample 'photo 4' cannot be read"):
        list(module(collate, 2, broken).test_dataloader())


def test_a_worker_that_dies_ends_the_run_in_one_line_that_names_the_samples(collate):
    """As the kernel kills the process that decodes an image too large for the machine."""
    broken = {4: lambda: os.kill(os.getpid(), signal.SIGKILL)}
    before = set(active_children())
    with pytest.raises(UserError, match=r"^DataLoader worker .* from 'photo \d' to 'photo \d'; .*workers=0") as raised:
        list(module(collate, 2, broken).test_dataloader())
    assert "\n" not in str(raised.value)
    assert set(active_children()) <= before, "the other one has ended too"


def test_signals_to_all_processes_of_a_run_are_the_main_process_s(collate):
    """Ctrl-C and Slurm signal workers too: the batch in flight must still arrive."""
    waiting = dict.fromkeys(range(COUNT), lambda: time.sleep(0.2))
    batches = iter(module(collate, 2, waiting, size=1).test_dataloader())
    before = set(active_children())
    first = next(batches)
    processes = set(active_children()) - before
    assert len(processes) == 2
    for name in ("INT", "TERM", "HUP"):  # from another process than the one that started them
        subprocess.run(["kill", f"-{name}", *(str(process.pid) for process in processes)], check=True)
    assert len([first, *batches]) == COUNT
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "the main process receives signals as before"


def test_abandoned_workers_end(collate):
    """An error in the loop leaves the iteration half-way; at the end of the process nobody may wait for a worker."""
    before = set(active_children())
    batches = iter(module(collate, 2, size=1).test_dataloader())
    next(batches)
    processes = set(active_children()) - before
    assert len(processes) == 2
    for process in processes:
        process.terminate()  # as multiprocessing does at exit
        process.join(5)
        assert process.exitcode == 0
    batches.close()


@pytest.mark.parametrize("processes", [0, 2])
def test_rows_read_what_an_earlier_one_prepared_to_the_bit(collate, processes, tmp_path):
    cache = BatchCache(tmp_path, 1 << 30)
    data = module(collate, processes, cache=cache)
    whole = list(module(collate).test_dataloader())
    equal(list(data.test_dataloader()), whole)
    assert cache.bytes > 10 * 3 * 144 * 144 * 4 and cache.hits == 0
    opened = data.data.opened
    equal(list(data.test_dataloader()), whole)
    assert data.data.opened == opened and cache.hits == len(whole)
    assert list(tmp_path.iterdir()) == [], "nothing is left by a process that is killed"


def test_the_cache_keeps_within_its_limit_and_only_what_is_needed_again(collate, tmp_path):
    one = BatchCache(tmp_path, 1 << 30)
    list(module(collate, cache=one).test_dataloader())
    cache = BatchCache(tmp_path, int(0.6 * one.bytes))
    data, whole = module(collate, cache=cache), list(module(collate).test_dataloader())
    for _ in range(3):
        equal(list(data.test_dataloader()), whole)
        assert 0 < cache.bytes <= cache.limit
    assert cache.hits == 2 * 2, "two of the four batches fit"
    unneeded = BatchCache(tmp_path, 1 << 30)
    unneeded.open = False
    list(module(collate, cache=unneeded).test_dataloader())
    assert unneeded.bytes == 0


def test_a_sample_that_failed_is_tried_again_by_every_row(collate, tmp_path):
    """A file may have been mended between two rows."""
    broken = {4: raising(DataError("no file"))}
    cache = BatchCache(tmp_path, 1 << 30)
    data = module(collate, broken=broken, cache=cache)
    list(data.test_dataloader())
    broken.clear()
    (_, mended, *_) = data.test_dataloader()
    assert not mended.failed and len(mended.samples) == 3


def test_on_a_full_disk_the_run_goes_on_without_the_cache(collate, tmp_path, monkeypatch):
    """Results need the room more."""
    said, write, calls = [], os.pwrite, []
    cache = BatchCache(tmp_path, 1 << 30, said.append)

    def pwrite(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data, whole = module(collate, cache=cache), list(module(collate).test_dataloader())
    equal(list(data.test_dataloader()), whole)
    equal(list(data.test_dataloader()), whole)
    (line,) = said
    assert "No space left on device; make room, or give trainer.cache_mib=0" in line
    assert cache.bytes == cache.hits == 0 and os.fstat(cache._file.fileno()).st_size == 0


def test_workers_by_default_are_the_cores_that_a_gpu_leaves(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(workers, "shared_memory", lambda: 8 << 30)
    assert [default_workers("cuda", processes) for processes in (1, 2, 4, 8, 16, 32)] == [8, 7, 3, 1, 1, 1]
    assert default_workers("cpu") == 0, "the model needs the cores itself"
    with monkeypatch.context() as docker:
        docker.setattr(workers, "shared_memory", lambda: 64 << 20)
        assert default_workers("cuda") == 0, "the first batch would end in a bus error"
    monkeypatch.setattr(workers, "CAN_FORK", False)
    assert default_workers("cuda") == 0
    with pytest.raises(UserError, match=r"trainer\.workers=2: worker processes need Linux; give 0"):
        workers.Loader([[0]], Prepare([], list), 2)


def test_a_sweep_opens_each_photograph_once_and_workers_change_no_outcome(tmp_path, monkeypatch):
    """Two ways through the same run: in workers, nothing kept; in the main process, with the cache."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    lines = []
    for number in range(5):
        Image.new("RGB", (200 + number, 150), (40 * number, 80, 0)).save(folder / f"{number}.jpg")
        lines.append(f'{{"id": "{number}", "image": "{number}.jpg", "question": "what color ?", "answer": "red"}}')
    (folder / "questions.jsonl").write_text("\n".join(lines))
    rows = "variants=[{label: none, pruner: none}, {label: ivtp, pruner: ivtp}, {label: topk, pruner: topk}]"
    common = (f"data.path={folder}", "data=folder", "data.max_new_tokens=1", rows, "trainer.batch_size=2")
    opened, open_image = [], questions.open_image
    monkeypatch.setattr(questions, "open_image", lambda path: opened.append(path.name) or open_image(path))
    # These show the photographs.
    monkeypatch.setattr("ivtp.experiment.steps.report", lambda *_: None)
    monkeypatch.setattr("ivtp.experiment.steps.viewer.save", lambda *_: frozenset())
    assert run(*common, "trainer.workers=2", "trainer.cache_mib=0", output=tmp_path / "workers") == 0
    assert opened == []
    assert run(*common, "trainer.workers=0", output=tmp_path / "cache") == 0
    assert sorted(opened) == [f"{number}.jpg" for number in range(5)]
    links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name.isdigit()
             and os.path.islink(f"/proc/self/fd/{name}")]  # fmt: skip
    assert not [link for link in links if str(tmp_path) in link], "the disk is free again, and could be taken out"
    one, other = (sorted((tmp_path / name / "run" / "outcomes").iterdir()) for name in ("workers", "cache"))
    assert len(one) == 3
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
