"""LLaVA and its kin: a tower of fixed size, a projector, a Llama-like decoder; here LLaVA-1.5, one crop an image."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ivtp.backbones import ModelError, family
from ivtp.backbones.clip_vit import ClipVit
from ivtp.backbones.companions import guide_for, text_sizes
from ivtp.backbones.decoders import decoder_layers
from ivtp.backbones.dinov2_vit import Dinov2Vit
from ivtp.backbones.generating import generating
from ivtp.backbones.pictures import Front, Layout, Picture
from ivtp.backbones.replacing import replaced
from ivtp.backbones.shared import SharedVision
from ivtp.backbones.siglip_vit import SiglipVit
from ivtp.backbones.transformers_attention import check_kernel
from ivtp.backbones.vlm import PrunedModel
from ivtp.pruning.cost import Shape
from ivtp.pruning.tokens import Tokens

TOWERS = {"clip_vision_model": ClipVit, "siglip_vision_model": SiglipVit, "dinov2": Dinov2Vit}


class Images(Protocol):
    """How a kin of LLaVA cuts an image into crops and puts these into the prompt."""

    separator: Tensor | None

    def pictures(self, input_ids: Tensor, inputs: dict) -> list[Picture]: ...

    def layout(self, kind: Hashable) -> Layout: ...


class OneCrop:
    """Every image is one crop of the tower's own size."""

    separator = None

    def __init__(self, model: nn.Module) -> None:
        self.made = Layout(shape(model), torch.arange(shape(model).patches, device=model.device))

    def pictures(self, input_ids: Tensor, inputs: dict) -> list[Picture]:
        pixels = inputs.get("pixel_values")
        return [] if pixels is None else [Picture("one crop", image[None]) for image in pixels]

    def layout(self, kind: Hashable) -> Layout:
        return self.made


class LlavaFront:
    """Tower and projector of a LLaVA-like model.

    Where the tower has no class token, the mean of what is left of the patches stands for the whole.
    """

    renumbers = True
    counts_padding = True

    def __init__(self, model: nn.Module, images: Images) -> None:
        self.core, self.config, self.images = model.model, model.config, images
        self.pictures, self.layout, self.separator = images.pictures, images.layout, images.separator
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        depth = self.config.vision_config.num_hidden_layers
        # hidden_states[i] is the input of layer i: hidden_states[-2] leaves layer depth - 2.
        self.features = tuple(layer % (depth + 1) - 1 for layer in layers)
        self.has_cls = shape(model).has_cls
        if list(self.features) != sorted(set(self.features)) or self.features[0] < 0:
            raise ValueError(
                f"vision_feature_layer={layers}: pruning joins the outputs of different layers in their order; give "
                "them ascending, without the embeddings (0)"
            )
        strategy = "default" if self.has_cls else "full"
        if self.config.vision_feature_select_strategy != strategy:
            raise ValueError(
                f"vision_feature_select_strategy={self.config.vision_feature_select_strategy!r} makes the class token an "
                f"image token, or takes a patch for one; pruning supports {strategy!r} (patches only) for this tower"
            )

    def stack(self, kind: Hashable):
        return TOWERS[self.config.vision_config.model_type](self.core.vision_tower, self.features)

    def read(self, tokens: Tokens) -> Tensor:
        return tokens.feature

    def project(self, features: Tensor) -> Tensor:
        return self.core.multi_modal_projector(features)

    def cls(self, stack, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        if self.has_cls:
            return tokens.feature[:, 0], stack.norm(tokens.x[:, 0])
        return mean_of_real(tokens.of_visual(tokens.feature), tokens), None

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, given: Tensor | None, inputs: dict) -> Tensor:
        return counted(input_ids) if given is None else given.expand_as(input_ids)


def counted(input_ids: Tensor) -> Tensor:
    """Positions as a decoder counts them by itself: from 0, padding included."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def mean_of_real(values: Tensor, tokens: Tokens) -> Tensor:
    """Mean of the visual tokens "c v f" that are not padding."""
    real = tokens.of_visual(tokens.valid)[:, :, None].to(values.dtype)
    return (values * real).sum(1) / real.sum(1).clamp_min(1)


def shape(model) -> Shape:
    """Sizes of a LLaVA-like model or of its config, its paired CLIP text encoder included.

    Raises ModelError for one whose tower or decoder would have to be opened in another way.
    """
    config = getattr(model, "config", model)
    kind = config.vision_config.model_type
    if kind not in TOWERS:
        raise ModelError(
            f"a {config.model_type} with vision_config of type {kind!r} cannot be pruned; supported: {', '.join(TOWERS)}"
        )
    features = config.vision_feature_layer
    return replace(
        family(config.vision_config).shape(config.vision_config),
        pool=None,  # the projector reads the patches; nothing is pooled
        projector_in=config.vision_config.hidden_size * (1 if isinstance(features, int) else len(features)),
        language=decoder_layers(config),
        vocabulary=config.text_config.vocab_size,
        **text_sizes(model),
    )


@contextmanager
def pruned(model: nn.Module, front, planner, instruction, read_at, part, shared, truth) -> Iterator[PrunedModel]:
    """A model whose own forward is replaced by the pruned one for as long as the context lasts."""
    outline = planner.outline
    if outline.position_ids == "renumber" and not front.renumbers:
        raise ValueError(
            "position_ids='renumber' would take the rows and columns out of M-RoPE; use position_ids='keep' with this model"
        )
    for pruner, config in ((outline.vision, model.config.vision_config), (outline.language, model.config.text_config)):
        check_kernel(config._attn_implementation, biased=bool(pruner and pruner.proportional))
    guide = guide_for(model, outline.reads_clip or outline.reads_relevance) if outline.needs_guide else None
    if guide is not None:
        guide.instructions = [instruction] if isinstance(instruction, str) else instruction
    run = PrunedModel(model, front, planner, guide, read_at, part, shared, truth)
    with replaced(model.model, forward=run.forward), generating(model, outline):
        yield run


def pruned_by(front: Callable[[nn.Module], Front]) -> Callable:
    """The context manager `prune` of a family, from what makes its front."""

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
        with pruned(model, front(model), planner, instruction, read_at, part, shared, truth) as run:
            yield run

    return prune


prune = pruned_by(lambda model: LlavaFront(model, OneCrop(model)))
