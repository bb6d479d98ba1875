"""The loop: a frozen stack of layers, opened between attention and FFN."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor

from ivtp.pruning.attention import Attention
from ivtp.pruning.pruner import Pruner
from ivtp.pruning.tokens import Tokens


@runtime_checkable
class Stack(Protocol):
    """What a model family provides: the layers of a frozen model, opened between attention and FFN."""

    depth: int

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        """Norm, attention, residual; the hidden states after it "b n d", and the attention that was used."""

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """Norm, FFN, residual."""

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        """Called after each layer: take a feature, remove a token that must not go on, or nothing."""

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        """The attention that `layer` would form over the tokens as they are; it leaves no trace in any cache."""

    def norm(self, x: Tensor) -> Tensor:
        """The norm behind the last layer."""


@dataclass(frozen=True)
class Kept:
    """What a cut left: original index, size and validity of the visual tokens that go on."""

    layer: int
    after: str
    position: Int[Tensor, "b k"]
    valid: Bool[Tensor, "b k"]


def traverse(
    stack: Stack,
    tokens: Tokens,
    pruner: Pruner | None = None,
    part: Callable[[str], AbstractContextManager] = nullcontext,
) -> tuple[Tokens, list[Kept]]:
    """Run the tokens through the stack and cut where the pruner says.

    A cut sees the attention of the layers since the cut before it (a "group"), as far as the pruner asks for it; a
    layer that nobody reads is forgotten at once. `part("pruner")` is entered around each cut, so that time and FLOPs of
    pruning can be told from those of the model.
    """
    cuts = {(cut.layer, cut.after): cut.keep for cut in pruner.schedule} if pruner else {}
    last = max([-2, *(layer for layer, _ in cuts)])  # torch 2.11 compiles no max with a default
    proportional = bool(pruner and pruner.proportional)
    needs = getattr(pruner, "needs", "group") if pruner and pruner.reads_attention else "none"
    seen: list[Attention] = []
    trace: list[Kept] = []

    def cut(layer: int, after: str, tokens: Tokens) -> Tokens:
        keep = cuts.get((layer, after))
        if keep is None:
            return tokens
        if keep < tokens.visual_count:
            with part("pruner"):
                if needs == "next":
                    seen.append(stack.peek(layer + 1, tokens))
                if getattr(pruner, "reads_state", False):
                    tokens = replace(tokens, state=stack.norm(tokens.x))
                tokens = pruner.cut(tokens, seen, keep)
        seen.clear()
        trace.append(Kept(layer, after, tokens.of_visual(tokens.position), tokens.of_visual(tokens.valid)))
        return tokens

    tokens = cut(-1, "block", tokens)
    for layer in range(stack.depth):
        x, attention = stack.attend(layer, tokens, proportional)
        if needs == "last":
            seen.clear()
        if layer <= last and (needs in ("group", "last") or (isinstance(needs, tuple) and layer in needs)):
            seen.append(attention)
        del attention
        tokens = cut(layer, "attn", tokens.with_x(x))
        tokens = tokens.with_x(stack.mlp(layer, tokens.x))
        tokens = cut(layer, "block", tokens)
        tokens = stack.leave(layer, tokens)
    return tokens, trace
