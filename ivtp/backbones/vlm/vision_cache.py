"""Memory of tower outputs for other plans with the same vision stage."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import Tensor

from ivtp.core.plan import Plan

T = TypeVar("T")


class VisionCache:
    """Tower outputs of one model by (vision side of the plan, content of the images in the batch).

    Whole batches only, and only identical ones: matrix products differ in their last bits with the batch size, and
    caching must not change a result. Memory stays below `limit` bytes; an output that does not fit is computed again.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.hits = self.misses = 0
        self.open = True  # False: no other row needs what is computed now
        self._outputs: dict[tuple, tuple[Any, int]] = {}

    def __call__(self, plan: Plan, images: Tensor, compute: Callable[[], T]) -> T:
        """`compute()`, or its earlier result; `images` "b" identifies each image by its content."""
        try:
            key = vision_side(plan), tuple(images.tolist())
            hash(key)
        except TypeError:  # a third-party stage that cannot be hashed
            return compute()
        if key in self._outputs:
            self.hits += 1
            return self._outputs[key][0]
        self.misses += 1
        output = compute()
        size = tensor_bytes(output)
        if self.open and self.bytes + size <= self.limit:
            self._outputs[key] = output, size
            self.bytes += size
        return output

    def keep_for(self, plans: Collection[Plan]) -> None:
        """Forget outputs that none of these plans needs."""
        for key in list(self._outputs):
            if not any(vision_side(plan) == key[0] for plan in plans):
                self.bytes -= self._outputs.pop(key)[1]


def vision_side(plan: Plan) -> tuple:
    """The part of a plan that the tower's output depends on."""
    return plan.vision, plan.image


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in tuples, lists, tokens and records; a view counts with its whole storage."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, (tuple, list)):
        return sum(map(tensor_bytes, value))
    if hasattr(value, "__dataclass_fields__"):
        return sum(tensor_bytes(getattr(value, name)) for name in value.__dataclass_fields__)
    return 0
