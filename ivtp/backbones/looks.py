"""What the pruned tower makes of a batch's images, and what each prompt gets to see of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ivtp.backbones.clip_vit import sample_number
from ivtp.backbones.pictures import Front, Layout, Picture
from ivtp.backbones.trace import Trace, merged
from ivtp.pruning.scores import mix
from ivtp.pruning.tokens import Tokens, take
from ivtp.pruning.traverse import Kept, traverse


@dataclass(frozen=True)
class Look:
    """What the tower made of all images of one kind in a batch; i counts them.

    slot      "i v" placeholder of every visual token that is left, in raster order; features "i v d"; taps: DeepStack's
    real      "i v" False where a slot is empty or has no placeholder; ragged: False where that is known to be nowhere
    """

    layout: Layout
    slot: Tensor
    features: Tensor
    size: Tensor
    real: Tensor
    sample: Tensor
    cls: tuple[Tensor, Tensor | None]
    taps: Tensor | None
    joint: Callable[[], Tensor]
    ragged: bool


def look(
    front: Front, planner, pictures: Sequence[Picture], vision_batch: int | None = None, part=nullcontext, shared=None
) -> tuple[dict, list[Kept]]:
    """By kind: the numbers of its pictures, and what the pruned tower made of them; and the cuts of all crops.

    vision_batch  crops that go through the tower at once; None: all. The others as of `PrunedModel`
    """
    looks, cuts, crops = {}, [], []
    for kind in dict.fromkeys(picture.kind for picture in pictures):
        numbers = [i for i, picture in enumerate(pictures) if picture.kind == kind]
        pixels = torch.stack([pictures[i].pixels for i in numbers])
        made, found = look_at(front, planner, kind, pixels, vision_batch, part, shared)
        looks[kind] = {number: row for row, number in enumerate(numbers)}, made
        cuts.append(found)
        crops += [(i, crop) for i in numbers for crop in range(made.layout.crops)]
    if len(cuts) < 2:
        return looks, cuts[0] if cuts else []
    order = torch.tensor(sorted(range(len(crops)), key=crops.__getitem__), device=pictures[0].pixels.device)
    sizes = [len(rows) * made.layout.crops for rows, made in looks.values()]
    return looks, merged([Trace(vision=found) for found in cuts], sizes, order).vision


def look_at(
    front: Front, planner, kind: Hashable, pixels: Tensor, vision_batch: int | None, part, shared
) -> tuple[Look, list[Kept]]:
    """What the pruned tower makes of all images of one kind, and its cuts."""
    layout, stack = front.layout(kind), front.stack(kind)
    crops, plan = layout.crops, planner.image(layout.shape)
    if layout.joins is not None and (plan.vision is not None or plan.image is not None):
        most = layout.advised
        limit = f"limit its crops (max_crops={most} of ivtp.load_model, model.max_crops={most}), " if most else ""
        raise ValueError(  # of this image alone: a run goes on with the others
            f"an image of {kind[0]} × {kind[1]} pixels (height × width) is interpolated behind the tower, so that its patches "
            f"cannot be cut inside it; {limit}make it smaller, or prune in the language model only"
        )
    # Beams, and several questions about one image, share its pass through the tower.
    numbers = sample_number(pixels)
    first, owner = distinct(numbers)

    def through_the_tower() -> tuple[Tokens, list[Kept], tuple[Tensor, Tensor | None]]:
        shown = pixels[first].flatten(0, 1)
        parts = []
        for some in shown.split(vision_batch or len(shown)):
            tokens, cuts = traverse(stack, stack.embed(some, plan.image), plan.vision, part)
            parts.append((tokens, cuts, front.cls(stack, tokens)))
        return parts[0] if len(parts) == 1 else one_after_another(parts)

    with part("vision"):
        tokens, cuts, cls = shared(plan, numbers[first], through_the_tower) if shared else through_the_tower()
        rows = (owner[:, None] * crops + torch.arange(crops, device=owner.device)).flatten()
        cuts = [replace(cut, position=cut.position[rows], valid=cut.valid[rows]) for cut in cuts]
        tokens = tokens.samples(rows)
    with part("projector"):
        features = front.project(tokens.of_visual(front.read(tokens)))
        if layout.joins is not None:
            features = torch.stack([layout.joins(image) for image in features.unflatten(0, (-1, crops))])
    images, v = len(pixels), features.shape[0] // len(pixels) * features.shape[1]
    taps = None
    if layout.joins is not None:
        slot, ragged = layout.carrying.expand(images, -1), False
        size, real = torch.ones(slot.shape, device=slot.device), torch.ones_like(slot, dtype=torch.bool)
        raster = slot.argsort(1)
    else:
        number = (
            tokens.of_visual(tokens.position)
            + layout.shape.patches * (torch.arange(len(rows), device=rows.device) % crops)[:, None]
        )
        slot = layout.slot_of[number].view(images, v)
        size, real = (tokens.of_visual(t).reshape(images, v) for t in (tokens.size, tokens.valid))
        # Raster order, whatever order merging left; behind it what the model's packing leaves out.
        last, room = len(layout.slots), len(layout.carrying)
        ragged = tokens.facts.padded or room < layout.shape.tokens
        real = real & (slot >= 0)
        raster = slot.where(real if v > room else slot >= 0, last).argsort(dim=1, stable=True)[:, :room]
        slot = slot.where(slot >= 0, last - 1)
        if layout.shape.taps:
            taps = take(tokens.of_visual(tokens.feature).view(images, v, -1), raster)
    slot, size, real = (t.gather(1, raster) for t in (slot, size, real))
    features = take(features.reshape(images, v, -1), raster)

    def joint() -> Tensor:
        """Every visual token where CLIP compares "i v c"."""
        width = layout.shape.vision.width
        patches = stack.norm(tokens.of_visual(tokens.feature)[:, :, -width:])
        return take(patches.reshape(images, v, -1), raster)

    cls = tuple(None if whole is None else whole.unflatten(0, (-1, crops))[owner, layout.base] for whole in cls)
    sample = tokens.sample.view(images, crops)[:, 0]
    return Look(layout, slot, features, size, real, sample, cls, taps, joint, ragged), cuts


@dataclass(frozen=True)
class Seen:
    """What prompts with images of the same kinds show the language model, their images side by side.

    looks     of every image of a prompt: its look, and its row in it for every prompt
    places    a prompt's image tokens
    carrying  "r" which of them carry a visual one; separators: which do not
    rank      "b v" which of those each surviving visual token is
    ragged    False: all of `real` is True
    """

    looks: list[tuple[Look, Tensor]]
    places: int = 0
    carrying: Tensor | None = None
    separators: Tensor | None = None
    rank: Tensor | None = None
    features: Tensor | None = None
    size: Tensor | None = None
    real: Tensor | None = None
    sample: Tensor | None = None
    cls: tuple[Tensor, Tensor | None] | None = None
    taps: Tensor | None = None
    ragged: bool = False

    @classmethod
    def of(cls, prompts: list[list[tuple[Look, int]]]) -> Seen:
        looks = []
        for images in zip(*prompts, strict=True):
            look = images[0][0]
            looks.append((look, torch.tensor([row for _, row in images], device=look.slot.device)))
        if not looks:
            return cls([])

        def side_by_side(name: str) -> Tensor | None:
            found = [getattr(look, name) for look, _ in looks]
            return None if found[0] is None else torch.cat([t[i] for t, (_, i) in zip(found, looks, strict=True)], 1)

        ranks, carrying, separators, before, carried = [], [], [], 0, 0
        for look, rows in looks:
            layout = look.layout
            rank = ((layout.slots >= 0).long().cumsum(0) - 1).clamp_min(0)
            ranks.append(rank[look.slot[rows]] + carried)
            carrying.append(layout.carrying + before)
            separators.append(layout.separators + before)
            before, carried = before + len(layout.slots), carried + len(layout.carrying)
        sample = looks[0][0].sample[looks[0][1]]
        for look, rows in looks[1:]:
            sample = mix(sample) + look.sample[rows]
        wholes = [[None if part is None else part[rows] for part in look.cls] for look, rows in looks]
        # Several images: what stands for the whole is the mean of what stands for each.
        whole = [None if parts[0] is None else torch.stack(parts).mean(0) for parts in zip(*wholes, strict=True)]
        if len(looks) == 1:
            whole = wholes[0]
        return cls(
            looks,
            before,
            torch.cat(carrying),
            torch.cat(separators),
            torch.cat(ranks, 1),
            side_by_side("features"),
            side_by_side("size"),
            side_by_side("real"),
            sample,
            (whole[0], whole[1]),
            side_by_side("taps"),
            any(look.ragged for look, _ in looks),
        )

    def joint(self) -> Tensor:
        return torch.cat([look.joint()[rows] for look, rows in self.looks], 1)


def looks_of(looks: dict, number: int) -> tuple[Look, int]:
    """The look that picture `number` is in, and its row there."""
    return next((look, rows[number]) for rows, look in looks.values() if number in rows)


def one_after_another(parts: list[tuple[Tokens, list[Kept], tuple[Tensor, Tensor | None]]]) -> tuple:
    """What the tower made of a batch in parts, as if it had been one."""
    tokens, cuts, wholes = zip(*parts, strict=True)
    cuts = [
        replace(
            same[0], position=torch.cat([cut.position for cut in same]), valid=torch.cat([cut.valid for cut in same])
        )
        for same in zip(*cuts, strict=True)
    ]
    whole = tuple(None if kind[0] is None else torch.cat(kind) for kind in zip(*wholes, strict=True))
    return Tokens.together(tokens), cuts, whole


def distinct(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The first place of each different entry, in order, and for every entry which of those it equals."""
    same = numbers[:, None] == numbers[None]
    first = same.int().argmax(1)
    places = first.unique()
    return places, torch.searchsorted(places, first)
