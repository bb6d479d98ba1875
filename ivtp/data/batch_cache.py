"""Prepared batches on disk, for rows of a run that differ in pruning only."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load, save

from ivtp.data.batches import Batch, unpack


class Place(NamedTuple):
    """Place of a batch in the file of a cache: bytes of its inputs, then of its texts; and the indices of its samples."""

    indices: tuple[int, ...]
    start: int
    inputs: int
    texts: int


class BatchCache:
    """Batches of one data set and one processor by the indices of their samples.

    The file has no name: it ends with the process, however that ends, and cannot be mistaken for that of another run.
    Worker processes that are started later share it. Room that a batch takes is never given to another, so that a batch that
    was stored is there for all rows.

    limit  bytes; at most half of what is free where `folder` lies. A batch that does not fit is prepared again
    say    prints a line when the disk is full
    """

    def __init__(self, folder: Path, limit: int, say: Callable[[str], None] = lambda line: None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.limit = min(limit, shutil.disk_usage(folder).free // 2)
        self.say, self.reported = say, False
        self.open = True  # False: no other row needs what is prepared now
        self.hits = 0
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # it is open as long as this object
        self._places: dict[tuple[int, ...], Place] = {}
        self._end = multiprocessing.Value("q", 0)  # of the part in use; negative: an error's number, nothing is in use

    @property
    def bytes(self) -> int:
        """Bytes in use."""
        return max(0, self._end.value)

    def read(self, indices: Sequence[int]) -> Batch | None:
        """The batch of these samples, None if it is not here."""
        place = self._places.get(tuple(indices))
        if place is None:
            return None
        inputs, texts = self._read(place.start, place.inputs), self._read(place.start + place.inputs, place.texts)
        if self._end.value < 0:  # what was read may have been given up meanwhile
            return None
        return replace(unpack(load(inputs), texts), place=place)

    def write(self, indices: Sequence[int], batch: Batch) -> Batch:
        """Store a batch, if there is room; return it with its place, which `note` tells the main process."""
        if not self.open:
            return batch
        inputs = save({name: value.contiguous() for name, value in batch.inputs.items()})
        texts = batch.texts()
        with self._end.get_lock():
            start = self._end.value
            if start < 0 or start + len(inputs) + len(texts) > self.limit:
                return batch
            self._end.value += len(inputs) + len(texts)
        try:
            self._write(start, inputs)
            self._write(start + len(inputs), texts)
        except OSError as error:
            self._give_up(error)
            return batch
        return replace(batch, place=Place(tuple(indices), start, len(inputs), len(texts)))

    def note(self, batch: Batch) -> None:
        """Keep the place of a batch that was stored by a worker; say so if one could not be stored."""
        if self._end.value < 0 and not self.reported:
            self.reported = True
            self.say(
                f"prepared images are no longer kept for other rows: {os.strerror(-self._end.value)}; make room, or give "
                "trainer.cache_mib=0"
            )
        if isinstance(batch.place, Place):
            self.hits += batch.place.indices in self._places
            self._places[batch.place.indices] = batch.place

    def close(self) -> None:
        """Give the disk back at the end of a run."""
        self._file.close()

    def _give_up(self, error: OSError) -> None:
        """Give the disk back, which results need more."""
        with self._end.get_lock():
            first, self._end.value = self._end.value >= 0, -(error.errno or errno.EIO)
        if first:
            os.ftruncate(self._file.fileno(), 0)

    # A call of the system moves two gigabytes at most.

    def _read(self, start: int, length: int) -> bytes:
        parts = []
        while part := os.pread(self._file.fileno(), length, start):
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return b"".join(parts)

    def _write(self, start: int, content: bytes) -> None:
        view = memoryview(content)
        while view:
            written = os.pwrite(self._file.fileno(), view, start)
            start, view = start + written, view[written:]
