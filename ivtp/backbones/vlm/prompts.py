"""Prompts of a prefill: which images belong to which, and their token sequences with the features in the image slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ivtp.backbones.language.cache import check_prompt_mask
from ivtp.backbones.vlm.adapter import ImageInput, VLMAdapter
from ivtp.backbones.vlm.call import Call
from ivtp.backbones.vlm.vision_pass import EncodedImages
from ivtp.core.scores import mix
from ivtp.core.tokens import Facts, Selection, Tokens, indices, put
from ivtp.registry import UserError


def images_of_prompts(
    adapter: VLMAdapter, image_token_id: int, input_ids: Tensor, inputs: dict
) -> tuple[list[ImageInput], list[list[int]], int | None]:
    """Images of a batch, and their numbers for each prompt, in order: as many as fill its image tokens; and the place of
    the first image token, where in every prompt all stand side by side from there.

    `generate` repeats prompts for its beams, but not their images.
    """
    beams = inputs.get("beams", 1)
    prompts = input_ids[::beams]
    images = adapter.image_inputs(prompts, inputs)
    sizes = [len(adapter.layout(image.kind).slots) for image in images]
    image = (prompts == image_token_id).int()
    counts, first, behind = torch.stack([image.sum(1), image.argmax(1), image.cumsum(1).argmax(1) + 1]).tolist()
    spans = {(start, end - start, count) for start, end, count in zip(first, behind, counts, strict=True)}
    start = first[0] if spans == {(first[0], counts[0], counts[0])} else None
    assigned, number = [], 0
    for prompt, count in enumerate(counts):
        own, free = [], count
        while free > 0 and number < len(images):
            own.append(number)
            free -= sizes[number]
            number += 1
        if free:
            makes = " + ".join(str(sizes[i]) for i in own) or "none is left"
            raise ValueError(
                f"prompt {prompt} of the batch has {count} image tokens, but its images make {makes}; let the "
                "processor write the prompts, one image token for each image"
            )
        assigned.append(own)
    if number < len(images):
        raise ValueError(
            f"{len(images)} images, but the {len(counts)} prompts have image tokens for {number}; give every image "
            "its place in a prompt"
        )
    repeated = [own for own in assigned for _ in range(beams)]
    numbers = iter(range(beams * len(images)))
    return [images[i] for own in repeated for i in own], [[next(numbers) for _ in own] for own in repeated], start


@dataclass(frozen=True)
class ImageSlots:
    """The images of prompts with images of the same kinds, side by side.

    images    for each image of a prompt: the encoded group, and each prompt's row in it
    count     image tokens of a prompt
    feature_slots  "r" those with a visual token; separators: those without
    rank      "b v" rank of each visual token that is left among the feature slots
    ragged    False: all of `real` is True
    """

    images: list[tuple[EncodedImages, Tensor]]
    count: int
    feature_slots: Tensor
    separators: Tensor
    rank: Tensor
    features: Tensor
    size: Tensor
    real: Tensor
    sample: Tensor
    global_feature: Tensor
    taps: Tensor | None
    ragged: bool

    @classmethod
    def of(cls, groups: Sequence[EncodedImages], assigned: Sequence[Sequence[int]]) -> ImageSlots | None:
        """Slots of prompts from the numbers of their images; None for prompts without images."""
        images = []
        for numbers in zip(*assigned, strict=True):
            encoded = next(encoded for encoded in groups if numbers[0] in encoded.rows)
            rows = torch.tensor([encoded.rows[number] for number in numbers], device=encoded.rank.device)
            images.append((encoded, rows))
        if not images:
            return None

        in_order = [
            numbers == tuple(e.rows) for numbers, (e, _) in zip(zip(*assigned, strict=True), images, strict=True)
        ]

        def side_by_side(name: str) -> Any:
            values = [getattr(encoded, name) for encoded, _ in images]
            if values[0] is None:
                return None
            values = [t if whole else t[rows] for t, (_, rows), whole in zip(values, images, in_order, strict=True)]
            return values[0] if len(values) == 1 else torch.cat(values, 1)

        ranks, feature_slots, separators, slots, features = [], [], [], 0, 0
        for encoded, rows in images:
            layout = encoded.layout
            ranks.append(encoded.rank[rows] + features)
            feature_slots.append(layout.feature_slots + slots)
            separators.append(layout.separators + slots)
            slots, features = slots + len(layout.slots), features + len(layout.feature_slots)
        sample = images[0][0].sample[images[0][1]]
        for encoded, rows in images[1:]:
            sample = mix(sample) + encoded.sample[rows]
        return cls(
            images=images,
            count=slots,
            feature_slots=torch.cat(feature_slots),
            separators=torch.cat(separators),
            rank=torch.cat(ranks, 1),
            features=side_by_side("features"),
            size=side_by_side("size"),
            real=side_by_side("real"),
            sample=sample,
            global_feature=mean_of_images([encoded.global_feature[rows] for encoded, rows in images]),
            taps=side_by_side("taps"),
            ragged=any(encoded.ragged for encoded, _ in images),
        )

    def joint_feature(self) -> Any:
        """Global feature of the images of each prompt for CLIP's joint space "b d", if available."""
        features = [(encoded.joint_feature(), rows) for encoded, rows in self.images]
        known = [feature[rows] for feature, rows in features if feature is not None]
        return mean_of_images(known) if known else None

    def joint(self) -> Tensor:
        """Every visual token in CLIP's joint space "b v c"."""
        return torch.cat([encoded.joint()[rows] for encoded, rows in self.images], 1)


def mean_of_images(features: list[Tensor]) -> Tensor:
    """Global feature of all images of each prompt "b f": the mean of those of its images."""
    return features[0] if len(features) == 1 else torch.stack(features).mean(0)


@dataclass(frozen=True)
class Prompts:
    """The prompts of one call, or a group of them.

    valid      "b n" False: padding; padded: whether there is any
    positions  RoPE positions "b n", or "3 b n"
    numbers    numbers of these prompts among the `total` of the call
    start      place of the first image token, where in every prompt all stand side by side from there
    """

    input_ids: Tensor
    valid: Tensor
    padded: bool
    positions: Tensor
    numbers: Sequence[int]
    total: int
    start: int | None = None

    @classmethod
    def of(cls, call: Call, adapter: VLMAdapter, reads_last: bool, start: int | None) -> Prompts:
        """All prompts of a call; `reads_last`: the last token of each is needed, so that it must not be padding."""
        check_prompt_mask(call.input_ids, call.attention_mask)
        mask = call.attention_mask
        valid = torch.ones_like(call.input_ids, dtype=torch.bool) if mask is None else mask.bool()
        padded = mask is not None and not bool(valid.all())
        if padded and reads_last and not bool(valid[:, -1].all()):
            raise UserError(
                "a prompt ends in padding, but its last token is needed; pad on the left (tokenizer.padding_side='left')"
            )
        positions = adapter.positions(call.input_ids, mask, call.position_ids, call.inputs)
        total = len(call.input_ids)
        return cls(call.input_ids, valid, padded, positions, range(total), total, start)

    def group(self, numbers: Sequence[int]) -> Prompts:
        """Some of the prompts, without the padding that all of them have on the left."""
        start = int(self.valid[numbers].any(0).int().argmax())
        index = torch.tensor(numbers, device=self.input_ids.device)
        valid = self.valid[index, start:]
        return Prompts(
            self.input_ids[index, start:],
            valid,
            self.padded and not bool(valid.all()),
            self.positions[..., index, start:],
            numbers,
            self.total,
        )

    def image_tokens(self, image_token_id: int, count: int) -> Tensor:
        """Places of the `count` image tokens of each prompt "b s"."""
        return indices(self.input_ids == image_token_id, count)


def assemble(
    prompts: Prompts, embedded: Tensor, image: Tensor, slots: ImageSlots | None, separator: Tensor | None
) -> Tokens:
    """Token sequences with the features that are left in their slots; the other image tokens are gone.

    embedded   embeddings of all tokens "b n d"; image: places of the image tokens "b s"
    separator  embedding of a slot without a visual token
    Positions count from the first image token.
    """
    ids, valid = prompts.input_ids, prompts.valid
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last, nothing = place == ids.shape[1] - 1, torch.zeros_like(valid)
    place = place if slots is None else place - image[:, :1]
    words = mix(((ids * valid).long() * (2 * place + 1)).sum(1))
    if slots is None:
        facts = Facts(0, prompts.padded)
        return Tokens.of(embedded, nothing, last, position=place, valid=valid, sample=mix(words), facts=facts)
    if separator is not None and len(slots.separators):
        fixed = image[:, slots.separators]
        embedded = put(embedded, fixed, separator.to(embedded).expand(*fixed.shape, -1))
    visual = image[:, slots.feature_slots]
    tokens = Tokens.of(
        embedded,
        nothing.scatter(1, visual, True),
        last,
        position=place,
        valid=valid,
        sample=mix(slots.sample + words),
        facts=Facts(
            visual.shape[1], prompts.padded, start=prompts.start if image.shape[1] == visual.shape[1] else None
        ),
    )
    real = None if not slots.ragged or bool(slots.real.all()) else slots.real
    if slots.rank.shape[1] == visual.shape[1] and real is None:
        tokens = tokens.with_x(put(embedded, visual, slots.features))
    else:
        tokens = tokens.keep(Selection(slots.rank, valid=real), lambda *_: (slots.features, slots.size), None)
    if slots.taps is not None:
        blank = tokens.x.new_zeros(*tokens.x.shape[:2], slots.taps.shape[2])
        tokens = replace(tokens, feature=put(blank, tokens.visual_index, slots.taps))
    return tokens
