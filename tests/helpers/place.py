"""Device and number type of the models in the tests, from the environment: the oracles on a GPU, or in half precision.

IVTP_TEST_DEVICE   cpu (default), cuda, or "pretend": a CPU whose tensors say that they are on a GPU (helpers.pretend)
IVTP_TEST_DTYPE    float32 (default), bfloat16 or float16
"""

from __future__ import annotations

import os
from copy import deepcopy
from functools import wraps

import torch

DEVICE = os.environ.get("IVTP_TEST_DEVICE", "cpu")
DTYPE: torch.dtype = getattr(torch, os.environ.get("IVTP_TEST_DTYPE", "float32"))
PRETENDED = DEVICE == "pretend"
if PRETENDED:
    from helpers.pretend import pretend

    pretend()
    DEVICE = "cuda"

ROUNDING = {torch.float32: 1.0 if DEVICE == "cpu" else 10.0, torch.float16: 3e3, torch.bfloat16: 4e4}[DTYPE]
"""What a tolerance for float32 on a CPU is multiplied by."""


def placed(x):
    """A model, a tensor or a dict of tensors on the tests' device, its floating-point numbers in the tests' type."""
    if isinstance(x, dict):
        return {key: placed(value) for key, value in x.items()}
    if isinstance(x, torch.nn.Module):
        return x.to(DEVICE, DTYPE)
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE, DTYPE) if x.is_floating_point() else x.to(DEVICE)
    return x


_wide: dict[int, tuple] = {}


def wide(model):
    """The same weights in float32."""
    if torch.float32 == DTYPE:
        return model
    if id(model) not in _wide:
        _wide[id(model)] = model, deepcopy(model).float()
    return _wide[id(model)][1]


def reference(function):
    """Mark a function that computes an oracle from a model: in float32, what it makes on the tests' device."""

    @wraps(function)
    def computed(*arguments, **more):
        def widened(x):
            if isinstance(x, torch.nn.Module):
                return wide(x)
            if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16):
                return x.float()
            return {key: widened(value) for key, value in x.items()} if isinstance(x, dict) else x

        with torch.device(DEVICE):
            return function(*map(widened, arguments), **{key: widened(value) for key, value in more.items()})

    return computed
