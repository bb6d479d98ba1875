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


def halving(run: Callable[[int], None], size: int, say: Callable[[str], None]) -> int:
    """Call `run` with a batch size, half of it whenever memory does not suffice; the size in the end.

    `run` goes on where it was. Raises UserError where not even one sample fits.
    """
    while True:
        try:
            run(size)
            return size
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise UserError(
                    "out of memory with one sample at a time (trainer.batch_size=1); give the model fewer bytes "
                    "(model.dtype=bfloat16), free the device of other work, or keep nothing of the tower (trainer.share_mib=0)"
                ) from error
        # Outside of the handler, so that nothing holds on to the tensors of the batch that failed.
        size = (size + 1) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory: going on with trainer.batch_size={size}")
