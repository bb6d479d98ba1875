"""InternVL (2.5, 3, 3.5) in its transformers form: crops and a thumbnail, pixel shuffle, a Qwen or Llama decoder."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ivtp.backbones import ModelError
from ivtp.backbones.decoders import decoder_layers
from ivtp.backbones.internvl_vit import InternVit
from ivtp.backbones.llava import counted, pruned
from ivtp.backbones.shared import SharedVision
from ivtp.backbones.vlm import Layout, Picture, PrunedModel
from ivtp.pruning.cost import Layers, Shape
from ivtp.pruning.tokens import Tokens


class InternFront:
    """Every crop is a picture of its own in the prompt: the model itself treats them alike, and so does the budget."""

    separator = None

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
        of_crop = shape(model)
        self.made = Layout(of_crop, torch.arange(of_crop.patches, device=model.device))

    def pictures(self, inputs: dict) -> list[Picture]:
        pixels = inputs.get("pixel_values")
        return [] if pixels is None else [Picture("crop", crop[None]) for crop in pixels]

    def layout(self, kind: Hashable) -> Layout:
        return self.made

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


def shape(model) -> Shape:
    """Sizes of a model or of its config, for one crop."""
    config = getattr(model, "config", model)
    vision = config.vision_config
    if vision.model_type != "internvl_vision":
        raise ModelError(f"an InternVL with vision_config of type {vision.model_type!r} cannot be pruned")
    heads, width, side = vision.num_attention_heads, vision.hidden_size, round(1 / config.downsample_ratio)
    layers = Layers(vision.num_hidden_layers, width, vision.intermediate_size, heads, heads, width // heads, 2)
    rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    one = Shape(
        layers,
        rows * columns // side**2,
        vision.num_channels * vision.patch_size[0] * vision.patch_size[1],
        projector_in=width * side**2,
        language=decoder_layers(config),
        vocabulary=config.text_config.vocab_size,
        columns=columns // side,
        unit=side**2,
        resizable=False,
    )
    return replace(one)


@contextmanager
def prune(
    model: nn.Module,
    planner,
    instruction,
    read_at: int,
    part,
    shared: SharedVision | None = None,
    truth: Tensor | None = None,
) -> Iterator[PrunedModel]:
    with pruned(model, InternFront(model), planner, instruction, read_at, part, shared, truth) as run:
        yield run
