"""A device that says "cuda" and computes on the CPU: a tensor left on the wrong device fails here as it does on a GPU."""

from __future__ import annotations

import torch
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

GPU = torch.device("cuda", 0)
MIXED = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "to", "set_"}
"""Operators that take tensors of several devices: copies, and indices that are on a CPU."""


class OnGpu(torch.Tensor):
    """Tensor on the pretended device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=GPU
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_) -> str:
        return f"OnGpu({self.inner})"

    def __deepcopy__(self, memo):
        made = OnGpu(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=False)
        memo[id(self)] = made
        return made

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Mode in which what is made on "cuda" is made on the CPU and says otherwise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operator on the CPU after the checks of devices that a GPU makes."""
    if func.namespace == "ivtp":
        from ivtp.core import kernels

        with Pretending():
            return kernels.streamed_sums._init_fn(*args, **kwargs)  # Triton needs a GPU
    flat, spec = tree_flatten((args, kwargs))
    gpu = [x for x in flat if isinstance(x, OnGpu)]
    cpu = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) and x.dim()]
    name = func._schema.name.removeprefix("aten::")
    if gpu and cpu and name not in MIXED:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu")
    if cpu and name in ("index", "index_put_", "index_put") and not isinstance(args[0], OnGpu) and gpu:
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    asked = next((x for x in flat if isinstance(x, torch.device)), None)
    there = bool(gpu) if asked is None else asked.type == "cuda"
    if name == "copy_":
        there = isinstance(args[0], OnGpu)
    plain = [
        x.inner if isinstance(x, OnGpu) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat
    ]
    plain_args, plain_kwargs = tree_unflatten(plain, spec)
    out = func(*plain_args, **plain_kwargs)
    same = {id(x.inner): x for x in gpu} if there else {}
    outs, shape = tree_flatten(out)
    wrapped = [same[id(x)] if id(x) in same else OnGpu(x) if there and isinstance(x, torch.Tensor) else x for x in outs]
    return tree_unflatten(wrapped, shape)


def pretend() -> None:
    """Let this process believe that it has a GPU."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Pretending().__enter__()
    make = torch.tensor

    def tensor(data, *, device=None, **more):
        """`torch.tensor`, whose path for a list of numbers on a GPU asks the driver."""
        return make(data, device="cpu", **more).to(device or _device.CURRENT_DEVICE or "cpu")

    torch.tensor = tensor
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.set_device = lambda *_: None
    torch.cuda.get_device_name = lambda *_: "pretended"
    torch.cuda._lazy_init = lambda: None
