"""Processes of one run, its ranks, each with a device and a model of its own.

torchrun or srun starts them, or `launch`, which is torchrun without its command. Every rank runs the whole command; they
meet before and after each row. Rank 0 alone writes results, prints and reports. Messages go through gloo, also between
GPUs: outcomes are a few numbers, and gloo fails at once, where NCCL waits, when the other side is dead.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning import Fabric
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy

from ivtp import results as store
from ivtp.data.failures import first_line
from ivtp.registry import LAUNCHED, RankLost, UserError
from ivtp.signals import Stopped

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""Time to wait for the slowest rank at the end of a row."""
SHUTDOWN = "60"
"""Seconds that ranks have for the batch in flight when the run is stopped."""


def cluster() -> ClusterEnvironment | None:
    """Environment of a process that torchrun or srun has started; None without one of them."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # A batch script has SLURM_NTASKS, too, but is no task: it has no step.
    if "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect():
        try:
            return SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:
            raise UserError(first_line(error)) from error
    return None


def to_launch(trainer) -> int:
    """Number of ranks that this process has to start; 1: it is one itself."""
    started, devices = cluster(), trainer.devices
    if started is not None and started.world_size() > 1:
        return 1
    if trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: one command starts the ranks of one machine; start this one on every "
            f"machine with srun, or with torchrun --nnodes={trainer.num_nodes}"
        )
    if kind_of_device(trainer) != "cuda":
        return 1 if devices == "auto" else devices
    count = cuda_devices(trainer)
    if devices != "auto" and devices > count:
        raise UserError(f"trainer.devices={devices}, but torch sees {count} CUDA device(s) here; use at most so many")
    return count if devices == "auto" else devices


def launch(arguments: Sequence[str], ranks: int) -> None:
    """Run the command in several processes of this machine, and wait for them.

    Raises UserError in one line for the first error of a rank, after the others have stopped.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what it says in many lines is said here in one
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN)
    with TemporaryDirectory(prefix="ivtp-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            run_id=f"{LAUNCHED}{uuid.uuid4().hex}",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "ivtp.run", *arguments)
        except SignalException as stop:
            raise Stopped(stop.sigval) from None
        except ChildFailedError as error:
            raise UserError(cause_of(error.failures)) from None


def cause_of(failures: dict[int, Any]) -> str:
    """Error that ended a run, in one line: that of a rank, else the signal or status with which one has ended.

    failures  of the ranks, also of those that were stopped because of another one
    """
    told = [failure.message["message"] for failure in failures.values() if isinstance(failure.message, dict)]
    if told:
        return told[0].partition(": ")[2]
    rank = min(failures, key=lambda rank: (failures[rank].exitcode > 0, failures[rank].exitcode))
    failure = failures[rank]
    how = failure.signal_name() if failure.exitcode < 0 else f"status {failure.exitcode}"
    return f"rank {rank} has ended with {how}, and the others were stopped; the same command goes on from here"


def start(trainer) -> None:
    """Join the other ranks, if torchrun, srun or `launch` has started several."""
    started = cluster()
    if started is None or started.world_size() == 1:
        return
    world, nodes = started.world_size(), trainer.num_nodes
    devices = world // nodes if trainer.devices == "auto" else trainer.devices
    if devices * nodes != world:
        raise UserError(
            f"trainer.devices={devices} on trainer.num_nodes={nodes} make {devices * nodes} rank(s), but {world} were "
            f"started; set trainer.devices={max(1, world // nodes)}"
        )
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they announce every rank
    strategy = DDPStrategy(cluster_environment=started, process_group_backend="gloo", timeout=PATIENCE)
    try:
        # Fabric only brings the ranks together. Where their models are is up to `device_of`.
        Fabric(accelerator="cpu", devices=devices, num_nodes=nodes, strategy=strategy).launch()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the ranks of the run do not find each other: {first_line(error)}") from error
    global _parent
    _parent = os.getppid()


_parent: int | None = None


def check() -> None:
    """Raise RankLost in a rank whose starter is dead: nobody waits for it any more."""
    if _parent is not None and os.getppid() != _parent:
        raise RankLost("the process that started this rank has ended; the same command goes on from here")


def number() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """True in rank 0, and in a run of one process."""
    return number() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        with _meeting():
            dist.barrier()


def shared(compute: Callable[[], T]) -> T:
    """Value that rank 0 computes, in every rank."""
    value: list[Any] = [compute() if first() else None]
    if world() > 1:
        with _meeting():
            dist.broadcast_object_list(value)
    return value[0]


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost("another rank has ended before its work was done; the same command goes on from here") from error


def agree(keys: Sequence[str]) -> None:
    """Raise UserError where a rank plans other rows than rank 0: their results would be mixed."""
    if shared(lambda: list(keys)) != list(keys):
        raise UserError(
            f"rank {number()} has other code, data or weights than rank 0; use the same on every machine, on a shared disk"
        )


@contextmanager
def only_writers(folder: Path) -> Iterator[None]:
    """Hold the lock of the results: rank 0 that of the folder, every other rank one of its own.

    A rank may outlive a run that was killed by a few seconds; the next run waits for it.
    """
    if first():
        with store.only_writer(folder):
            for path in folder.glob(f"{store.LOCK}.rank*[0-9]"):
                with store.only_writer(folder, path.name):
                    pass
            barrier()
            yield
    else:
        barrier()
        with store.only_writer(folder, f"{store.LOCK}.rank{number()}"):
            yield


def on_this_machine(trainer) -> int:
    """Number of ranks that share the cores, the disk and the GPUs of this machine."""
    return world() // trainer.num_nodes


def kind_of_device(trainer) -> str:
    """Kind of device, "cpu" or "cuda", that `trainer.device` and `trainer.accelerator` ask for."""
    if trainer.device != "auto":
        return trainer.device.partition(":")[0]
    if trainer.accelerator != "auto":
        return "cpu" if trainer.accelerator == "cpu" else "cuda"
    return "cuda" if torch.cuda.is_available() else "cpu"


def cuda_devices(trainer) -> int:
    """Number of CUDA devices; raises UserError if there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        key = "accelerator" if trainer.device == "auto" else "device"
        raise UserError(f"trainer.{key}={trainer[key]}, but torch sees no CUDA device here; use trainer.{key}=cpu")
    return count


def device_of(trainer, device_map: object = None) -> str:
    """Device of this rank's model; ranks of one machine take its GPUs in turn, or with a device map a part of them each."""
    if kind_of_device(trainer) == "cpu":
        return "cpu"
    started = cluster()
    local, ranks = started.local_rank() if started else 0, on_this_machine(trainer)
    if device_map is not None and ranks > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(cuda_devices(trainer))))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(portion(visible.split(","), local, ranks))
        return "cuda"
    count = cuda_devices(trainer)
    device = f"cuda:{local % count}" if ranks > 1 else trainer.device if trainer.device.startswith("cuda") else "cuda"
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise UserError(f"trainer.device={device}, but torch sees {count} CUDA device(s) here, from cuda:0 on")
    torch.cuda.set_device(index)
    return device


def portion(devices: list[str], local: int, ranks: int) -> list[str]:
    """Devices of one of several ranks of a machine, neighbours in the list."""
    if len(devices) < ranks:
        raise UserError(f"{ranks} ranks with model.device_map need a CUDA device each, but torch sees {len(devices)}")
    return devices[local * len(devices) // ranks : (local + 1) * len(devices) // ranks]
