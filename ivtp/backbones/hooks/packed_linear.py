"""Linear layers whose weights lie as the CPU's kernels read them.

The usual product on a CPU rearranges the whole weight for every call, which takes as long for few tokens as for many:
pruning then saves FLOPs, but no time. oneDNN, which torch brings along, can rearrange the weight once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ivtp.registry import UserError

AVAILABLE = torch.backends.mkldnn.is_available()


class PackedLinear(nn.Linear):
    """`nn.Linear` with an opaque weight: it has a shape and a dtype, but only oneDNN can read it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(module: nn.Module) -> nn.Module:
    """Pack every float32 `nn.Linear` of `module` in place, for good; its outputs differ by rounding only.

    Raises UserError where there is nothing to pack, or no oneDNN.
    """
    if not AVAILABLE:
        raise UserError(
            f"weights are packed by oneDNN, which this build of torch {torch.__version__} lacks; leave pack out"
        )
    linears = [layer for layer in module.modules() if type(layer) is nn.Linear]
    unfit = next((layer.weight for layer in linears if not fits(layer.weight)), None)
    if unfit is not None or not linears:
        what = "no linear layers" if unfit is None else f"weights in {str(unfit.dtype)[6:]} on {unfit.device}"
        raise UserError(f"pack=true: {what}; float32 weights on a CPU can be packed, so leave pack out here")
    for layer in linears:
        with torch.no_grad():
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.__class__ = PackedLinear
    return module


def fits(weight: Tensor) -> bool:
    """Return whether a weight can be packed."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def flops(x, weight, *_, **__) -> int:
    """FLOPs of the matrix product."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


if AVAILABLE:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(flops)
