"""The images of a batch as a family sees them, and what a family has to provide."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ivtp.pruning.cost import Shape
from ivtp.pruning.tokens import Tokens
from ivtp.pruning.traverse import Stack


@dataclass(frozen=True)
class Picture:
    """One image of a batch.

    kind    what images must share to go through the tower side by side (their size)
    pixels  what the tower reads: crops "c 3 h w", or patches "1 p i"
    """

    kind: Hashable
    pixels: Tensor


@dataclass(frozen=True)
class Layout:
    """How the images of one kind fill their placeholders in a prompt.

    shape  sizes of the model for such an image
    slots  for every placeholder "s" the number of its visual token (crop after crop), -1: a separator. A visual token
           without a placeholder (of a crop's padding) does not reach the language model
    base   the crop that shows the whole image
    rows   crops, where the language model does not get their visual tokens as they are (`joins`)
    joins  None, or how the model itself blends the visual tokens "c v d" of a whole, unpruned image into those of `slots`
    advised  the largest `max_crops` with which no image is blended, None: there is none
    """

    shape: Shape
    slots: Tensor
    base: int = 0
    joins: Callable[[Tensor], Tensor] | None = None
    rows: int = 0
    advised: int | None = None

    @property
    def crops(self) -> int:
        return self.rows or self.shape.crops

    # Looked up once for all images: what asks a GPU for a number makes it wait.
    @cached_property
    def carrying(self) -> Tensor:
        """The placeholders with a visual token "r"."""
        return (self.slots >= 0).nonzero()[:, 0]

    @cached_property
    def separators(self) -> Tensor:
        """The placeholders without."""
        return (self.slots < 0).nonzero()[:, 0]

    @cached_property
    def slot_of(self) -> Tensor:
        """For every visual token its placeholder, -1: none."""
        blank = torch.full((self.shape.tokens,), -1, device=self.slots.device)
        return blank.scatter(0, self.slots[self.carrying], self.carrying)


class Front(Protocol):
    """What a family of models provides; all else is here.

    separator  embedding of a placeholder that carries no visual token "d", or None
    renumbers  False where positions cannot close up over what is cut (M-RoPE)
    counts_padding  whether positions that are not given count padding, as the model's own forward does
    """

    separator: Tensor | None
    renumbers: bool
    counts_padding: bool

    def pictures(self, input_ids: Tensor, inputs: dict) -> list[Picture]:
        """The images of a batch in the order of the prompts."""

    def layout(self, kind: Hashable) -> Layout: ...

    def stack(self, kind: Hashable) -> Stack:
        """The tower for images of this kind, with `embed(pixels, grid)`."""

    def read(self, tokens: Tokens) -> Tensor:
        """What the projector reads of what left the tower "c n f"."""

    def project(self, features: Tensor) -> Tensor:
        """ "c n f" → "c n d" of the language model."""

    def cls(self, stack: Stack, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """What stands for the whole of every crop "c f" where the projector reads, and where CLIP compares (if it does)."""

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None, given: Tensor | None, inputs: dict) -> Tensor:
        """RoPE positions of a prompt: "b n", or "3 b n"."""
