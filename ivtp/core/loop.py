"""The loop: a frozen stack of layers, opened between attention and FFN."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor

from ivtp.core.attention import Attention
from ivtp.core.plan import NOTHING, Stage
from ivtp.core.schedule import Cut
from ivtp.core.tokens import Tokens


@runtime_checkable
class Stack(Protocol):
    """The layers of a frozen model, opened between attention and FFN: each model family provides them.

    read  leading layers whose output is read behind the stack; later ones run as far as a cut needs them
    """

    depth: int
    read: int

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        """Norm, attention, residual; the hidden states after it "b n d", and the attention that was used."""
        ...

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """Norm, FFN, residual."""
        ...

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        """Hook after each layer: store a feature, remove a token that only the layers so far need, or change nothing."""
        ...

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        """The attention that `layer` would form over these tokens; no cache is written."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """The norm behind the last layer."""
        ...


@dataclass(frozen=True)
class Kept:
    """Visual tokens behind one cut: their original index, and False where a slot is only padding."""

    layer: int
    after: str
    position: Int[Tensor, "b k"]
    valid: Bool[Tensor, "b k"]

    def of(self, sample: int) -> Int[Tensor, " r"]:
        """Original indices of the tokens of one sample that are real."""
        return self.position[sample][self.valid[sample]]


def traverse(
    stack: Stack,
    tokens: Tokens,
    stage: Stage | None = None,
    part: Callable[[str], AbstractContextManager] = nullcontext,
) -> tuple[Tokens, list[Kept]]:
    """Run the tokens through the stack, with the cuts of the stage.

    A cut reads the attention of the layers since the cut before it (a "group"), as far as the stage needs it; a record
    that no cut reads is dropped at once, and layers whose output nobody reads are not run (`Schedule.reach`).
    `part("pruner")` is entered around each cut, so that time and FLOPs of
    pruning can be told from those of the model.
    """
    stage = NOTHING if stage is None else stage
    schedule, needs = stage.schedule, stage.needs
    last = schedule[-1].layer if len(schedule) else -1
    group: list[Attention] = []
    trace: list[Kept] = []

    def shortened(tokens: Tokens, cut: Cut | None) -> Tokens:
        if cut is None:
            return tokens
        if cut.keep < tokens.visual_count:
            with part("pruner"):
                if needs == "next":
                    group.append(stack.peek(cut.layer + 1, tokens))
                if stage.reads_state:
                    tokens = replace(tokens, state=stack.norm(tokens.x))
                tokens = stage.cut(tokens, group, cut.keep)
        group.clear()
        trace.append(Kept(cut.layer, cut.after, tokens.of_visual(tokens.position), tokens.of_visual(tokens.valid)))
        return tokens

    attended, fed = schedule.reach(stack.read)
    steps = schedule.walk(stack.depth, tokens.visual_count)[:attended]
    tokens = shortened(tokens, schedule.first)
    for step in steps:
        x, attention = stack.attend(step.layer, tokens, stage.proportional)
        if needs == "last":
            group.clear()
        if step.layer <= last and (needs in ("group", "last") or (isinstance(needs, tuple) and step.layer in needs)):
            group.append(attention)
        del attention
        tokens = shortened(tokens.with_x(x), step.before_ffn)
        if step.layer < fed:
            tokens = tokens.with_x(stack.mlp(step.layer, tokens.x))
        tokens = shortened(tokens, step.behind)
        tokens = stack.leave(step.layer, tokens)
    return tokens, trace
