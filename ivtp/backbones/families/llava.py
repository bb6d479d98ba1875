"""LLaVA-1.5, -NeXT and -OneVision: a tower of fixed size, which reads images whole or in crops; a Llama-like decoder."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from ivtp.backbones.family import Family, ModelError, family_of, register_family
from ivtp.backbones.hooks.padding import mean_of_real
from ivtp.backbones.language.llama import decoder_layers
from ivtp.backbones.loading.image_inputs import advised_crops
from ivtp.backbones.text.pairing import text_sizes
from ivtp.backbones.vision.transformers import ClipVit, Dinov2Vit
from ivtp.backbones.vlm.adapter import ImageInput, Layout, VLMAdapter
from ivtp.core.flops import Shape
from ivtp.core.plan import Stage
from ivtp.core.tokens import Tokens

TOWERS = {"clip_vision_model": ClipVit, "siglip_vision_model": ClipVit, "dinov2": Dinov2Vit}
MOST = 1024
"""Layouts that are kept; a few hundred kilobytes each."""
USUAL = (672, 672)
"""Height and width, in pixels, of the image in crops whose cost is given where none is named: 2 × 2 crops and the whole."""


class LlavaAdapter(VLMAdapter):
    """LLaVA-1.5: every image is one crop of the tower's own size.

    Where the tower has no class token, the mean over the patches that are left is the global feature.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.core, self.config = model, model.model, model.config
        self.of_crop = llava_shape(model)
        self.features = feature_layers(self.config)
        if list(self.features) != sorted(set(self.features)) or self.features[0] < 0:
            raise ValueError(
                f"vision_feature_layer={self.config.vision_feature_layer}: pruning joins the outputs of different layers in "
                "their order; give them ascending, without the embeddings (0)"
            )
        strategy = "default" if self.of_crop.has_cls else "full"
        if self.config.vision_feature_select_strategy != strategy:
            raise ValueError(
                f"vision_feature_select_strategy={self.config.vision_feature_select_strategy!r} makes the class token an "
                f"image token, or takes a patch for one; pruning supports {strategy!r} (patches only) for this tower"
            )
        whole = Layout(self.of_crop, torch.arange(self.of_crop.patches, device=model.device))
        self.layouts: dict[Hashable, Layout] = {"one crop": whole}

    def image_inputs(self, input_ids: Tensor, inputs: dict) -> list[ImageInput]:
        pixels = inputs.get("pixel_values")
        return [] if pixels is None else [ImageInput("one crop", image[None]) for image in pixels]

    def layout(self, kind: Hashable) -> Layout:
        return self.layouts[kind]

    def stack(self, kind: Hashable) -> ClipVit:
        return TOWERS[self.config.vision_config.model_type](self.core.vision_tower, self.features)

    def global_feature(self, stack: ClipVit, tokens: Tokens) -> Tensor:
        features = self.projector_input(tokens)
        return features[:, 0] if self.of_crop.has_cls else mean_of_real(tokens.of_visual(features), tokens)

    def joint_feature(self, stack: ClipVit, tokens: Tokens, stage: Stage | None) -> Tensor | None:
        return stack.class_token(tokens, stage) if self.of_crop.has_cls else None


class CropsAdapter(LlavaAdapter):
    """LLaVA-NeXT: images of any size, the whole first, then the crops of the grid that the model's config chooses for that
    size. Rows of crops end in newline tokens, and padding is taken out again.

    The model's own packing, given numbers instead of features, tells the slot of every visual token.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.separator = self.core.image_newline
        self.layouts, self.kinds = {}, {}

    def image_inputs(self, input_ids: Tensor, inputs: dict) -> list[ImageInput]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        if len(self.layouts) > MOST:
            self.layouts.clear()
            self.kinds.clear()
        images, before = [], 0
        for number, size in enumerate(inputs["image_sizes"].tolist()):
            kind = self._kind(tuple(size), self._in_crops(number, inputs))
            crops = self.layouts[kind].crops
            if pixels.ndim == 5:  # padded to the most crops of the batch
                rows = pixels[number, :crops]
            else:
                rows, before = pixels[before : before + crops], before + crops
            images.append(ImageInput(kind, rows))
        return images

    def _in_crops(self, number: int, inputs: dict) -> bool:
        """Return whether this image of the batch is cut into crops."""
        return True

    def _kind(self, size: tuple[int, int], in_crops: bool) -> Hashable:
        """Kind of an image; sizes that fill a prompt in the same way are of one kind."""
        key = size if in_crops else None
        if key not in self.kinds:
            layout = self._layout(size, in_crops)
            same = (kind for kind, known in self.layouts.items() if alike(known, layout))
            self.kinds[key] = next(same, size if in_crops else "one crop")
            self.layouts.setdefault(self.kinds[key], layout)
        return self.kinds[key]

    def _layout(self, size: tuple[int, int], in_crops: bool) -> Layout:
        side = self.config.vision_config.image_size
        crops = image_size_to_num_patches(size, self.config.image_grid_pinpoints, side) if in_crops else 1
        numbers = torch.arange(1, crops * self.of_crop.patches + 1, dtype=torch.float64, device=self.model.device)
        # A newline counts as -1; a number that is no longer whole was blended from several.
        packed = self._pack(numbers.view(crops, -1, 1), size, -torch.ones_like(numbers[:1]))[:, 0]
        slots = (packed.round().long() - 1).clamp_min(-1)
        features = int((slots >= 0).sum())
        shape = replace(self.of_crop, crops=crops, by_image=True, separators=len(slots) - features)
        if bool((packed == packed.round()).all()):
            return Layout(shape, slots)
        blend = partial(self._pack, size=size, newline=None)
        return Layout(
            shape.in_one_crop(features), slots, blend=blend, blended_crops=crops, max_crops=advised_crops(self.config)
        )

    def _pack(self, features: Tensor, size: tuple[int, int], newline: Tensor | None) -> Tensor:
        """Features "c v d" of the crops as the model puts them into the prompt "s d"."""
        strategy = self.config.vision_feature_select_strategy
        return self.core.pack_image_features([features], torch.tensor([size]), strategy, image_newline=newline)[0][0]


class BlendedCropsAdapter(CropsAdapter):
    """LLaVA-OneVision: several images of a prompt stay whole, and too many tokens are interpolated to fewer."""

    def _in_crops(self, number: int, inputs: dict) -> bool:
        counts = inputs.get("batch_num_images")
        return counts is None or [n == 1 for n in counts.tolist() for _ in range(n)][number]

    def _pack(self, features: Tensor, size: tuple[int, int], newline: Tensor | None) -> Tensor:
        ratio, sizes = self.config.vision_aspect_ratio, torch.tensor([size])
        return self.core.pack_image_features([features], sizes, image_newline=newline, vision_aspect_ratio=ratio)[0][0]


def alike(one: Layout, other: Layout) -> bool:
    """Return whether two layouts without blending fill a prompt in the same way."""
    same = one.shape == other.shape and torch.equal(one.slots, other.slots)
    return same and one.blend is None and other.blend is None


def llava_shape(model: Any) -> Shape:
    """Sizes of a LLaVA-like model or of its config for one crop, its paired CLIP text encoder included.

    Raises ModelError for one whose tower or decoder would have to be opened in another way.
    """
    config = getattr(model, "config", model)
    kind = config.vision_config.model_type
    if kind not in TOWERS:
        raise ModelError(
            f"a {config.model_type} with vision_config of type {kind!r} cannot be pruned; supported: {', '.join(TOWERS)}"
        )
    features = feature_layers(config)
    return replace(
        family_of(config.vision_config).shape(config.vision_config),
        pool=None,  # the projector reads the patches; nothing is pooled
        read=max(features) + 1,
        projector_in=config.vision_config.hidden_size * len(features),
        language=decoder_layers(config),
        vocabulary=config.text_config.vocab_size,
        **text_sizes(model),
    )


def feature_layers(config: Any) -> tuple[int, ...]:
    """The 0-based tower layers whose outputs the projector reads; -1: the embeddings."""
    layers = config.vision_feature_layer
    # hidden_states[i] is the input of layer i: hidden_states[-2] leaves layer depth - 2.
    depth = config.vision_config.num_hidden_layers
    return tuple(layer % (depth + 1) - 1 for layer in ([layers] if isinstance(layers, int) else layers))


@register_family("llava")
class Llava(Family):
    """LLaVA-1.5 in its transformers form."""

    adapter = LlavaAdapter

    def shape(self, model: Any, image: tuple[int, int] | None = None) -> Shape:
        """Sizes for one crop."""
        return llava_shape(model)


@register_family("llava_next")
class LlavaNext(Family):
    """LLaVA-NeXT (LLaVA-1.6) in its transformers form."""

    adapter = CropsAdapter

    def shape(self, model: Any, image: tuple[int, int] | None = None) -> Shape:
        """Sizes for an image of `image` (height, width) pixels, with all of its crops."""
        config, one = getattr(model, "config", model), llava_shape(model)
        side = config.vision_config.image_size
        rows, columns = get_anyres_image_grid_shape(image or USUAL, config.image_grid_pinpoints, side)
        return replace(one, crops=rows * columns + 1, by_image=True, separators=rows * one.grid[0])


@register_family("llava_onevision")
class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision in its transformers form: SigLIP instead of CLIP."""

    adapter = BlendedCropsAdapter
