"""Planners: from a pruner and its budget to a plan, once the sizes of a prompt's images are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ivtp.core.flops import Shape
from ivtp.core.plan import Plan
from ivtp.pruners import check_plan, load_pruner


@dataclass(frozen=True)
class Planner:
    """Pruner `name` with its settings, for images of any size.

    shape  sizes of the model and of the usual image
    ratio  the share of every image's visual tokens that stays; None: `keep` of the settings counts them
    """

    name: str
    shape: Shape
    settings: dict[str, Any]
    ratio: float | None = None
    _plans: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def outline(self) -> Plan:
        """The plan as far as no image's size changes it; its counts hold only where every image has the same."""
        if not self.shape.by_image or self._keep(self.shape) == {}:
            return self.image(self.shape)
        return load_pruner(self.name, self.shape, **(self.settings | {"keep": self.shape.tokens, "per": "image"}))

    def image(self, shape: Shape) -> Plan:
        """The plan for one image of this shape."""
        if shape not in self._plans:
            self._plans[shape] = load_pruner(self.name, shape, **(self.settings | self._keep(shape)))
        return self._plans[shape]

    def prompt(self, shapes: Sequence[Shape]) -> Plan:
        """The plan for the language model when a prompt holds images of these shapes: their budgets add up, and inside
        it they compete for the sum. None of their towers' cuts is in it."""
        if len(shapes) == 1:
            return self.image(shapes[0])
        key = tuple(shapes)
        if key not in self._plans:
            plans = [self.image(shape) for shape in shapes]
            tokens = sum(shape.tokens for shape in shapes)
            plan = plans[0]
            if plan.language is not None:
                settings = {name: value for name, value in self.settings.items() if name != "per"}
                if self.ratio is not None or "keep" in settings:
                    settings["keep"] = sum(self._counted(shape) for shape in shapes)
                reach = sum(plan.leaving(s.patches, s.crops) for plan, s in zip(plans, shapes, strict=True))
                plan = load_pruner(self.name, shapes[0].in_one_crop(tokens), **settings).reached_by(reach)
            self._plans[key] = plan
        return self._plans[key]

    def _keep(self, shape: Shape) -> dict[str, Any]:
        if self.ratio is not None:
            return {"keep": max(shape.crops, round(self.ratio * shape.tokens))}
        keep = self.settings.get("keep")
        # A small image may have fewer tokens than every image may keep: then all of them stay.
        most = shape.patches if self.settings.get("per") == "crop" else shape.tokens
        return {"keep": min(keep, most)} if shape.by_image and isinstance(keep, int) else {}

    def _counted(self, shape: Shape) -> int:
        keep = (self.settings | self._keep(shape))["keep"]
        return keep * shape.crops if self.settings.get("per") == "crop" and self.ratio is None else keep


@dataclass(frozen=True)
class Fixed:
    """One given plan, for images of the shape it was made for."""

    outline: Plan

    def image(self, shape: Shape) -> Plan:
        """The plan, if it can be carried out on such an image; raises ValueError."""
        check_plan(self.outline, shape)
        return self.outline

    def prompt(self, shapes: Sequence[Shape]) -> Plan:
        """The plan for a prompt with one image; raises ValueError for more, whose tokens it does not count."""
        if len(shapes) > 1 and self.outline.language is not None:
            raise ValueError(
                f"a prompt holds {len(shapes)} images, but a Plan counts the tokens of one; name the method instead, as in "
                "ivtp.prune(model, 'ivtp', keep=64), where keep counts for each image"
            )
        return self.image(shapes[0])
