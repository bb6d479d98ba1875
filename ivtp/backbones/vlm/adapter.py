"""The VLM adapter that a family provides, its image inputs and their image slots in a prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ivtp.core.flops import Shape
from ivtp.core.plan import Stage
from ivtp.core.tokens import Tokens


@dataclass(frozen=True)
class ImageInput:
    """One image of a batch.

    kind    equal for images that can go through the tower side by side (their size)
    pixels  input of the tower: crops "c 3 h w", or patches "1 p i"
    """

    kind: Hashable
    pixels: Tensor


@dataclass(frozen=True)
class Layout:
    """Image slots of all images of one kind.

    shape   sizes of the model for such an image
    slots   for every slot "s" the number of its visual token (crop after crop), -1: a separator. A visual token without a
            slot (of a crop's padding) does not reach the language model
    base    the crop that shows the whole image
    blend   None, or the model's own interpolation of the visual tokens "c v d" of an unpruned image to those of `slots`
    blended_crops  crops of an image that is blended
    max_crops  the largest `max_crops` with which no image is blended; None: there is none
    """

    shape: Shape
    slots: Tensor
    base: int = 0
    blend: Callable[[Tensor], Tensor] | None = None
    blended_crops: int = 0
    max_crops: int | None = None

    @property
    def crops(self) -> int:
        """Crops of an image, blended or not."""
        return self.blended_crops or self.shape.crops

    # Cached for all images, to avoid a GPU synchronisation per image.
    @cached_property
    def feature_slots(self) -> Tensor:
        """Slots with a visual token "r"."""
        return (self.slots >= 0).nonzero()[:, 0]

    @cached_property
    def separators(self) -> Tensor:
        """Slots without a visual token."""
        return (self.slots < 0).nonzero()[:, 0]

    @cached_property
    def rank_of(self) -> Tensor:
        """Rank of every visual token among the feature slots, -1: it has no slot."""
        blank = torch.full((self.shape.tokens,), -1, device=self.slots.device)
        blank[self.slots[self.feature_slots]] = torch.arange(len(self.feature_slots), device=self.slots.device)
        return blank


class VLMAdapter(Protocol):
    """The part of a family that turns images into visual tokens; everything else is shared by all families. A class that
    inherits declares what differs from these defaults.

    core        the model without its LM head
    separator   embedding "d" of a slot without a visual token, or None
    renumbers   False where positions cannot close up over removed tokens (M-RoPE)
    counts_padding  whether default positions count padding, as in the model's own forward
    """

    core: Any
    separator: Tensor | None = None
    renumbers: bool = True
    counts_padding: bool = True

    def __init__(self, model: Any) -> None: ...

    def image_inputs(self, input_ids: Tensor, inputs: dict) -> list[ImageInput]:
        """Images of a batch in the order of the prompts."""
        ...

    def layout(self, kind: Any) -> Layout:
        """Image slots of images of this kind."""
        ...

    def stack(self, kind: Any) -> Any:
        """The tower for images of this kind, as a `Stack` with `embed(pixels, grid)`."""
        ...

    def projector_input(self, tokens: Tokens) -> Tensor:
        """Input "c n f" of the projector, from the tokens that left the tower."""
        return tokens.x if tokens.feature is None else tokens.feature

    def project(self, features: Tensor) -> Tensor:
        """Project "c n f" to "c n d" of the language model."""
        return self.core.multi_modal_projector(features)

    def global_feature(self, stack: Any, tokens: Tokens) -> Tensor:
        """Global feature of each crop "c f", in projector-input space."""
        ...

    def joint_feature(self, stack: Any, tokens: Tokens, stage: Stage | None) -> Tensor | None:
        """Global feature of each crop "c d" that CLIP projects into its joint space, of tokens that left the tower under a
        stage; None: this tower has none. It is computed only where guidance reads it."""
        return None

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, given: Tensor | None, inputs: dict) -> Tensor:
        """RoPE positions of a prompt: "b n", or "3 b n"; by default counted from 0, padding included."""
        return default_positions(input_ids) if given is None else given.expand_as(input_ids)


def default_positions(input_ids: Tensor) -> Tensor:
    """Positions that a decoder counts by itself: from 0, padding included."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
