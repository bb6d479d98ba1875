"""The images of a batch through the pruned vision tower and the projector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ivtp.backbones.vision.patches import sample_number
from ivtp.backbones.vlm.adapter import ImageInput, Layout, VLMAdapter
from ivtp.backbones.vlm.trace import Trace, merged
from ivtp.backbones.vlm.vision_cache import VisionCache
from ivtp.core.loop import Kept, traverse
from ivtp.core.plan import Plan
from ivtp.core.tokens import Tokens, take


@dataclass(frozen=True)
class EncodedImages:
    """All images of one kind in a batch, behind the pruned tower and the projector; i counts them.

    rows      row of each image by its number in the batch
    rank      "i v" rank among the feature slots of every visual token that is left, in raster order
    features  "i v d"; taps: DeepStack's
    real      "i v" False where a token is only padding or has no slot; ragged: False if all of `real` is known to be True
    global_feature  of each image "i f", in projector-input space
    joint_feature   the same for CLIP's joint space "i d", if available
    joint     every visual token in CLIP's joint space "i v c"
    """

    rows: dict[int, int]
    layout: Layout
    rank: Tensor
    features: Tensor
    size: Tensor
    real: Tensor
    ragged: bool
    sample: Tensor
    global_feature: Tensor
    joint_feature: Callable[[], Tensor | None]
    taps: Tensor | None
    joint: Callable[[], Tensor]


class TowerOutput(NamedTuple):
    """Tokens that left the tower, a row per crop, with its cuts and the global feature of each crop."""

    tokens: Tokens
    cuts: list[Kept]
    global_feature: Tensor


@dataclass(frozen=True)
class VisionPass:
    """The way of a batch's images through the tower.

    batch  crops that go through the tower at once; None: all
    """

    adapter: VLMAdapter
    planner: Any
    batch: int | None
    part: Callable[[str], AbstractContextManager]
    cache: VisionCache | None

    def encode(self, images: Sequence[ImageInput]) -> tuple[list[EncodedImages], list[Kept]]:
        """Encode all images, those of one kind together; and the cuts of all crops in the order of the images."""
        groups, cuts, crops = [], [], []
        for kind in dict.fromkeys(image.kind for image in images):
            numbers = [i for i, image in enumerate(images) if image.kind == kind]
            encoded, own_cuts = self._encode_kind(kind, numbers, torch.stack([images[i].pixels for i in numbers]))
            groups.append(encoded)
            cuts.append(own_cuts)
            crops += [(i, crop) for i in numbers for crop in range(encoded.layout.crops)]
        if len(cuts) < 2:
            return groups, cuts[0] if cuts else []
        order = torch.tensor(sorted(range(len(crops)), key=crops.__getitem__), device=images[0].pixels.device)
        sizes = [len(encoded.rows) * encoded.layout.crops for encoded in groups]
        return groups, merged([Trace(vision=own_cuts) for own_cuts in cuts], sizes, order).vision

    def _encode_kind(self, kind: Any, numbers: Sequence[int], pixels: Tensor) -> tuple[EncodedImages, list[Kept]]:
        layout, stack = self.adapter.layout(kind), self.adapter.stack(kind)
        plan, crops, images = self.planner.image(layout.shape), layout.crops, len(pixels)
        if layout.blend is not None and (plan.vision is not None or plan.image is not None):
            # An error of this image alone, so that a run goes on with the others.
            most = layout.max_crops
            limit = f"limit its crops (max_crops={most} of ivtp.load_model, model.max_crops={most}), " if most else ""
            raise ValueError(
                f"an image of {kind[0]} × {kind[1]} pixels (height × width) is interpolated behind the tower, so that its "
                f"patches cannot be cut inside it; {limit}make it smaller, or prune in the language model only"
            )
        # Beams, and several questions about one image, share its pass through the tower.
        contents = sample_number(pixels)
        first, owner = distinct(contents)

        def compute() -> TowerOutput:
            return self._through_tower(stack, plan, pixels[first].flatten(0, 1))

        with self.part("vision"):
            left, cuts, of_crops = self.cache(plan, contents[first], compute) if self.cache else compute()
            tokens = left
            if len(first) < images:
                rows = (owner[:, None] * crops + torch.arange(crops, device=owner.device)).flatten()
                cuts = [replace(cut, position=cut.position[rows], valid=cut.valid[rows]) for cut in cuts]
                tokens = left.samples(rows)
        with self.part("projector"):
            features = self.adapter.project(tokens.of_visual(self.adapter.projector_input(tokens)))
            if layout.blend is not None:
                features = torch.stack([layout.blend(image) for image in features.unflatten(0, (-1, crops))])
        features = features.reshape(images, -1, features.shape[-1])
        placed = blended_slots(layout, images) if layout.blend is not None else pruned_slots(layout, tokens, images)
        order = placed[-1]
        rank, size, real = (t.gather(1, order) for t in placed[:-1])

        def in_order(values: Tensor) -> Tensor:
            return take(values.reshape(images, -1, values.shape[-1]), order)

        def joint() -> Tensor:
            output = self.adapter.projector_input(tokens)[:, :, -layout.shape.vision.width :]
            return in_order(stack.norm(tokens.of_visual(output)))

        @cache
        def joint_feature() -> Tensor | None:
            base = torch.arange(layout.base, len(left.x), crops, device=owner.device)
            feature = self.adapter.joint_feature(stack, left.samples(base), plan.vision)
            return None if feature is None else feature[owner]

        taps = tokens.feature if layout.shape.taps else None
        room = len(layout.feature_slots)
        encoded = EncodedImages(
            rows={number: row for row, number in enumerate(numbers)},
            layout=layout,
            rank=rank,
            features=in_order(features),
            size=size,
            real=real,
            ragged=layout.blend is None and (tokens.facts.padded or room < layout.shape.tokens),
            sample=tokens.sample.view(images, crops)[:, 0],
            global_feature=of_crops.unflatten(0, (-1, crops))[owner, layout.base],
            joint_feature=joint_feature,
            taps=None if taps is None else in_order(tokens.of_visual(taps)),
            joint=joint,
        )
        return encoded, cuts

    def _through_tower(self, stack: Any, plan: Plan, crops: Tensor) -> TowerOutput:
        """Run crops through the pruned tower, `batch` of them at once."""
        outputs = []
        for some in crops.split(self.batch or len(crops)):
            tokens, cuts = traverse(stack, stack.embed(some, plan.image), plan.vision, self.part)
            outputs.append(TowerOutput(tokens, cuts, self.adapter.global_feature(stack, tokens)))
        return outputs[0] if len(outputs) == 1 else joined(outputs)


Slots = tuple[Tensor, Tensor, Tensor, Tensor]
"""Rank, size and reality of each visual token "i v" as they left the tower, and their raster order "i r"."""


def blended_slots(layout: Layout, images: int) -> Slots:
    """Slots of images whose features the model has interpolated: all are filled."""
    rank = torch.arange(len(layout.feature_slots), device=layout.slots.device).expand(images, -1)
    return rank, torch.ones(rank.shape, device=rank.device), torch.ones_like(rank, dtype=torch.bool), rank


def pruned_slots(layout: Layout, tokens: Tokens, images: int) -> Slots:
    """Slots of the tokens that left the tower; their order is raster order, whatever order merging left."""
    crop = torch.arange(len(tokens.x), device=tokens.x.device) % layout.crops
    number = tokens.of_visual(tokens.position) + layout.shape.patches * crop[:, None]
    rank = layout.rank_of[number].view(images, -1)
    size, real = (tokens.of_visual(t).reshape(images, -1) for t in (tokens.size, tokens.valid))
    # Behind the real tokens come those without a slot: the model's packing leaves them out.
    room = len(layout.feature_slots)
    real = real & (rank >= 0)
    order = rank.where(real if rank.shape[1] > room else rank >= 0, room).argsort(dim=1, stable=True)[:, :room]
    return rank.where(rank >= 0, room - 1), size, real, order


def joined(outputs: Sequence[TowerOutput]) -> TowerOutput:
    """Outputs for the parts of a batch as one output."""
    tokens, cuts, features = zip(*outputs, strict=True)
    rows = [len(part.x) for part in tokens]
    order = torch.arange(sum(rows), device=tokens[0].x.device)
    trace = merged([Trace(vision=own_cuts) for own_cuts in cuts], rows, order)
    return TowerOutput(Tokens.together(tokens), trace.vision, torch.cat(features))


def distinct(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """First place of each different entry, in order, and for every entry the rank of its equal among those."""
    same = numbers[:, None] == numbers[None]
    first = same.int().argmax(1)
    places = first.unique()
    return places, torch.searchsorted(places, first)
