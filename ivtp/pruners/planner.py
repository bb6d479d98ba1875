"""From a method and its budget to a plan, once the sizes of a prompt's images are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ivtp.pruners import load_pruner
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan
from ivtp.pruning.schedules import check


@dataclass(frozen=True)
class Planner:
    """Method `name` with its settings for images of any size.

    shape  sizes of the model and of the usual image
    ratio  the share of every image's visual tokens that stays; None: `keep` of the settings counts them
    """

    name: str
    shape: Shape
    settings: dict
    ratio: float | None = None
    _made: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def outline(self) -> Plan:
        """All of the plan that no image's size changes; its cuts count only where every image has the same."""
        if not self.shape.by_image or self._keep(self.shape) == {}:
            return self.image(self.shape)
        return load_pruner(self.name, self.shape, **(self.settings | {"keep": self.shape.tokens, "per": "image"}))

    def image(self, shape: Shape) -> Plan:
        """The plan for one image of this shape."""
        if shape not in self._made:
            self._made[shape] = load_pruner(self.name, shape, **(self.settings | self._keep(shape)))
        return self._made[shape]

    def prompt(self, shapes: Sequence[Shape]) -> Plan:
        """The plan for the language model when a prompt holds images of these shapes: their budgets add up, and inside
        it they compete for the sum. None of their towers' cuts is in it."""
        if len(shapes) == 1:
            return self.image(shapes[0])
        key = tuple(shapes)
        if key not in self._made:
            plans = [self.image(shape) for shape in shapes]
            tokens = sum(shape.tokens for shape in shapes)
            whole = replace(shapes[0], patches=tokens, columns=tokens, crops=1)
            plan = plans[0]
            if plan.language is not None:
                settings = {name: value for name, value in self.settings.items() if name != "per"}
                if self.ratio is not None or "keep" in settings:
                    settings["keep"] = sum(self._counted(shape) for shape in shapes)
                reach = sum(plan.leaving(s.patches, s.crops) for plan, s in zip(plans, shapes, strict=True))
                plan = load_pruner(self.name, whole, **settings).reached_by(reach)
            self._made[key] = plan
        return self._made[key]

    def _keep(self, shape: Shape) -> dict[str, int]:
        if self.ratio is not None:
            return {"keep": max(shape.crops, round(self.ratio * shape.tokens))}
        keep = self.settings.get("keep")
        # A small image may have fewer tokens than every image may keep: then all of them stay.
        by_crop = self.settings.get("per") == "crop"
        most = shape.patches if by_crop else shape.tokens
        return {"keep": min(keep, most)} if shape.by_image and isinstance(keep, int) else {}

    def _counted(self, shape: Shape) -> int:
        keep = self._keep(shape).get("keep", self.settings.get("keep"))
        return keep * shape.crops if self.settings.get("per") == "crop" and self.ratio is None else keep


@dataclass(frozen=True)
class Fixed:
    """A plan that is given as it is, for the images it was made for."""

    plan: Plan

    @property
    def outline(self) -> Plan:
        return self.plan

    def image(self, shape: Shape) -> Plan:
        """The plan, if it can be carried out on such an image; raises ValueError."""
        if self.plan.vision is not None:
            check(self.plan.vision.schedule, shape.patches, shape.vision.depth, "vision")
        if self.plan.language is not None:
            check(
                self.plan.language.schedule,
                self.plan.leaving(shape.patches, shape.crops),
                shape.language.depth,
                "language",
            )
        return self.plan

    def prompt(self, shapes: Sequence[Shape]) -> Plan:
        if len(shapes) > 1 and self.plan.language is not None:
            raise ValueError(
                f"a prompt holds {len(shapes)} images, but a Plan counts the tokens of one; name the method instead, as in "
                "ivtp.prune(model, 'ivtp', keep=64), where keep counts for each image"
            )
        return self.image(shapes[0])
