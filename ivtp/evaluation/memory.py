"""When memory does not suffice: what says so, and what to do then."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from ivtp.registry import UserError


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice: torch's own, or what its allocator for CPUs, cuBLAS and cuDNN
    say in words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class DoesNotFit(Exception):
    """A sample that does not fit into memory even alone; it has its outcome."""


def check_device(error: BaseException) -> None:
    """Raise a UserError for an error after which a GPU can be used by a new process only."""
    said = str(error)
    broken = isinstance(error, torch.AcceleratorError) or "CUDA error" in said or "device-side assert" in said
    if broken and not out_of_memory(error):
        raise UserError(
            f"the device failed ({said.splitlines()[0]}); the same command goes on from here; if it fails again at the same "
            "place, CUDA_LAUNCH_BLOCKING=1 and trainer.batch_size=1 show the sample"
        ) from error


def halving(run: Callable[[int], None], size: int, say: Callable[[str], None]) -> int:
    """Call `run` with a batch size, half of it whenever memory does not suffice; the size in the end.

    `run` goes on where it was. Where a sample alone was the cause (DoesNotFit), the others go on with the size that was
    given. Raises UserError where not even one sample fits.
    """
    given = size
    while True:
        try:
            run(size)
            return size
        except DoesNotFit as error:
            said, following = f"a sample does not fit into memory alone ({error}); ", given
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise UserError(
                    "out of memory with one sample at a time (trainer.batch_size=1); give the model fewer bytes "
                    "(model.dtype=bfloat16), free the device of other work, or keep nothing of the tower (trainer.share_mib=0)"
                ) from error
            said, following = "out of memory: ", (size + 1) // 2
        # Outside of the handlers, so that nothing holds on to the tensors of the batch that failed.
        size = following
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"{said}going on with trainer.batch_size={size}")
