"""InternVL (2.5, 3, 3.5) in its transformers form: crops and a thumbnail, pixel shuffle, a Qwen or Llama decoder."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ivtp.backbones import ModelError
from ivtp.backbones.decoders import decoder_layers
from ivtp.backbones.internvl_vit import InternVit
from ivtp.backbones.llava import counted, pruned_by
from ivtp.backbones.pictures import Layout, Picture
from ivtp.pruning.cost import Layers, Shape
from ivtp.pruning.tokens import Tokens


class InternFront:
    """An image is a run of image tokens: its crops, and behind several of them the thumbnail that shows the whole.

    The model itself treats all crops of a batch alike and is not told whose they are.
    """

    separator = None
    renumbers = True
    counts_padding = True

    def __init__(self, model: nn.Module) -> None:
        self.model, self.core, self.config = model, model.model, model.config
        self.side = round(1 / self.config.downsample_ratio)
        depth = self.config.vision_config.num_hidden_layers
        layer = self.config.vision_feature_layer
        # -1: what the tower returns, behind its last norm; else hidden_states[i], the input of layer i.
        self.feature = depth if layer == -1 else layer % (depth + 1) - 1
        if self.feature < 0:
            raise ValueError(f"vision_feature_layer={layer} is the embeddings, before any layer that could prune")
        if self.config.vision_feature_select_strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy={self.config.vision_feature_select_strategy!r} passes the class token "
                "on as an image token; pruning supports 'default' (patches only)"
            )
        self.of_crop = shape(model)
        self.made: dict[int, Layout] = {}

    def pictures(self, input_ids: Tensor, inputs: dict) -> list[Picture]:
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        crops = [length / self.of_crop.patches for length in runs(input_ids == self.config.image_token_id)]
        if sum(crops) != len(pixels) or any(count != int(count) for count in crops):
            raise ValueError(
                f"{len(pixels)} crops, but the prompts have image tokens for {sum(crops):g}; let the processor write the "
                f"prompts, {self.of_crop.patches} image tokens for each crop"
            )
        return [Picture(len(rows), rows) for rows in pixels.split([int(count) for count in crops])]

    def layout(self, kind: int) -> Layout:
        if kind not in self.made:
            made = replace(self.of_crop, crops=kind, by_image=True)
            self.made[kind] = Layout(made, torch.arange(made.tokens, device=self.model.device), base=kind - 1)
        return self.made[kind]

    def stack(self, kind: Hashable) -> InternVit:
        return InternVit(self.core.vision_tower, self.feature, self.side)

    def read(self, tokens: Tokens) -> Tensor:
        return tokens.feature

    def project(self, features: Tensor) -> Tensor:
        return self.core.multi_modal_projector(features)

    def cls(self, stack: InternVit, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The class token four times, in the place of four patches (ours: pixel shuffle leaves it out)."""
        cls = tokens.feature[:, 0, : tokens.feature.shape[2] // stack.unit]
        return cls.repeat(1, stack.unit), None

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, given: Tensor | None, inputs: dict) -> Tensor:
        return counted(input_ids) if given is None else given.expand_as(input_ids)


def runs(image: Tensor) -> list[int]:
    """Lengths of the runs of image tokens, prompt after prompt."""
    between = torch.nn.functional.pad(image, (0, 1)).flatten()  # no run goes on into the next prompt
    kind, counts = torch.unique_consecutive(between, return_counts=True)
    return counts[kind].tolist()


def shape(model, image: tuple[int, int] | None = None) -> Shape:
    """Sizes of a model or of its config, for one crop, or for an image of `image` (height, width) pixels in crops and,
    where there are several, with a thumbnail."""
    config = getattr(model, "config", model)
    vision = config.vision_config
    if vision.model_type != "internvl_vision":
        raise ModelError(f"an InternVL with vision_config of type {vision.model_type!r} cannot be pruned")
    heads, width, side = vision.num_attention_heads, vision.hidden_size, round(1 / config.downsample_ratio)
    layers = Layers(vision.num_hidden_layers, width, vision.intermediate_size, heads, heads, width // heads, 2)
    rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    crops = 1
    if image is not None:
        tall, wide = (max(1, round(size / side)) for size, side in zip(image, vision.image_size, strict=True))
        crops = tall * wide + (tall * wide > 1)
    return Shape(
        layers,
        rows * columns // side**2,
        vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
        projector_in=width * side**2,
        language=decoder_layers(config),
        vocabulary=config.text_config.vocab_size,
        columns=columns // side,
        unit=side**2,
        crops=crops,
        by_image=True,
        resizable=False,
    )


prune = pruned_by(InternFront)
