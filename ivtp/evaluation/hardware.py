"""The machine of a measurement: which processor, and which libraries and kernels compute on it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch


def hardware(device: torch.device | str, kernel: str | None = None) -> dict[str, Any]:
    """Processor, cores and threads, the BLAS and the instruction set of torch on a CPU, and the attention kernel.

    kernel  attention implementation of the model, if there is one
    """
    device = torch.device(device)
    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "blas": blas(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernel": kernel,
    }


def attention_kernel(model: Any) -> str | None:
    """Attention implementation of a model of transformers; None for others."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def cpu() -> str:
    """Model of the CPU, where the system says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def blas() -> str:
    """Library of the matrix products that torch was built with, and oneDNN where it is there."""
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    name = found[1] if found else "unknown"
    return name + " + oneDNN" * torch.backends.mkldnn.is_available()
