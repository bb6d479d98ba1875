"""Worker processes that prepare batches ahead of the model."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader

from ivtp.data.batches import Batch, Prepare
from ivtp.data.failures import texts
from ivtp.registry import UserError

MOST = 8
"""Workers by default, at most."""
AHEAD = 1
"""Batches that each worker prepares ahead. More would fill shared memory: 50 images of LLaVA-NeXT take 340 MB."""
LEAST = 4 << 30
"""Bytes of shared memory without which no worker is started by default."""
CAN_FORK = "fork" in multiprocessing.get_all_start_methods() and hasattr(signal, "sigwaitinfo")
"""Linux: workers are copies of the main process, since data sets cannot be sent to a new one."""


def default_workers(device: torch.device | str, processes: int = 1) -> int:
    """Workers of each of `processes` on this machine: on a GPU their share of the cores, at most `MOST`; none on a CPU, whose
    cores the model itself needs, or where batches find no room in shared memory."""
    if torch.device(device).type == "cpu" or not CAN_FORK or shared_memory() < LEAST:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, max(1, cores // processes - 1))


def shared_memory() -> int:
    """Bytes of the shared memory through which batches come from workers; Docker gives 64 MiB unless it is told."""
    return shutil.disk_usage("/dev/shm").total


class Loader(DataLoader):
    """Batches of a data set in their order, each prepared at once, in the main process or in `workers`.

    batches  indices of the samples of each
    pin      hand them on in pinned memory
    """

    def __init__(self, batches: Sequence[Sequence[int]], prepare: Prepare, workers: int = 0, pin: bool = False) -> None:
        if workers and not CAN_FORK:
            raise UserError(f"trainer.workers={workers}: worker processes need Linux; give 0")
        more: dict[str, Any] = {}
        if workers:
            more = {"multiprocessing_context": "fork", "prefetch_factor": AHEAD, "worker_init_fn": end_with_parent}
        super().__init__(
            batches,  # type: ignore[arg-type]  # a list is a data set
            batch_size=None,  # each item is a whole batch
            collate_fn=prepare,
            num_workers=workers,
            pin_memory=pin,
            **more,
        )
        self.prepare = prepare

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Iterate over the batches; raise UserError, naming samples, if a worker process ends."""
        batches: Any = self.dataset
        # Tokenizers print a warning in each process that is forked behind their first threads, unless they are told.
        if self.num_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with signals_held_back() if self.num_workers else nullcontext():
            prepared: Iterator[Batch] = super().__iter__()
        for number in range(len(batches)):
            try:
                batch = next(prepared)
            except RuntimeError as error:
                died = str(error)
                if not died.startswith("DataLoader worker"):
                    raise
            else:
                if self.prepare.cache is not None:
                    self.prepare.cache.note(batch)
                yield batch
                continue
            # Outside of the handler, so that nothing holds on to the other workers.
            del prepared
            raise self._lost(batches[number : number + AHEAD * self.num_workers], died.splitlines()[0].rstrip(". "))

    def check_worker_number_rationality(self) -> None:
        """Do not warn of more workers than cores, as torch does: the number was asked for."""

    def _lost(self, ahead: Sequence[Sequence[int]], reason: str) -> UserError:
        """Error of a worker process that ended while it prepared one of these batches."""
        first, last = (texts(self.prepare.data, index)["id"] for index in (ahead[0][0], ahead[-1][-1]))
        shared = "shared memory (/dev/shm) may be full; " if "Bus error" in reason else ""
        return UserError(
            f"{reason} while samples were prepared, of those from {first!r} to {last!r}; {shared}the same command goes on "
            "from here, with trainer.workers=0 in one process"
        )


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Context in which the signals that stop a run wait. A process that is started in it never receives them.

    A terminal and Slurm signal all processes of a run, of which the main one decides when to stop.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(worker: int) -> None:
    """Let a worker end at the SIGTERM of its parent process, and of no other."""

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
