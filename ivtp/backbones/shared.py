"""What the vision tower made of a batch, kept for other plans that do the same in the tower."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import TypeVar

from torch import Tensor

from ivtp.pruning.pruner import Plan

T = TypeVar("T")


class SharedVision:
    """Answers of one model's tower by (vision side of the plan, content of the images in the batch).

    Whole batches only, and only the very same ones: products of matrices differ in their last bits with the size of the
    batch, and what is shared must not show in a result. Memory stays below `limit` bytes: what does not fit is not
    kept, and is made again.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.hits = self.misses = 0
        self.open = True  # False: what is made now is asked for by nobody else
        self._kept: dict[Hashable, tuple[object, int]] = {}

    def __call__(self, plan: Plan, images: Tensor, make: Callable[[], T]) -> T:
        """`make()`, or what it returned before; `images` "b" holds a number of each image's content."""
        try:
            key = vision_side(plan), tuple(images.tolist())
            hash(key)
        except TypeError:  # a pruner from elsewhere that cannot be compared
            return make()
        if key in self._kept:
            self.hits += 1
            return self._kept[key][0]
        self.misses += 1
        made = make()
        size = held(made)
        if self.open and self.bytes + size <= self.limit:
            self._kept[key] = made, size
            self.bytes += size
        return made

    def keep_for(self, plans: Collection[Plan]) -> None:
        """Forget what none of these plans will ask for."""
        for key in list(self._kept):
            if not any(vision_side(plan) == key[0] for plan in plans):
                self.bytes -= self._kept.pop(key)[1]


def vision_side(plan: Plan) -> tuple:
    """All of a plan that the tower's answer depends on."""
    return plan.vision, plan.image


def held(value: object) -> int:
    """Bytes of the tensors in tuples, lists, tokens and records; of a view, all that it holds on to."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, (tuple, list)):
        return sum(map(held, value))
    if hasattr(value, "__dataclass_fields__"):
        return sum(held(getattr(value, name)) for name in value.__dataclass_fields__)
    return 0
