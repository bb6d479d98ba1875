"""Choices: the interchangeable parts of a stage, and what each of them declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ivtp.core.attention import Attention
from ivtp.core.tokens import Scalars, Selection, Tokens


@dataclass(frozen=True)
class CutSizes:
    """Sizes of one cut, which the matrix products of its choices depend on.

    group       layers since the last cut
    n           tokens of the sequence, v of them visual, of which `keep` stay
    references  reference tokens
    heads …     sizes of the layers
    """

    group: int
    n: int
    v: int
    keep: int
    references: int
    heads: int
    kv_heads: int
    head_width: int
    width: int


@runtime_checkable
class Choice(Protocol):
    """Capabilities of a score, select, reduce or metric. A class that inherits declares what differs from these defaults.

    needs            attentions that are read: of the "group" of layers since the last cut, the "last" of them, those of
                     the layers in a tuple, the one that the "next" layer would form, or "none"
    reads_state      True: `tokens.state` is read, the hidden states after the model's last norm
    reads_relevance  True: `tokens.relevance` is read, the cosine of each visual token with the instruction
    reads_target     True: `tokens.relevance` is read, and holds ground truth (an oracle)
    asks_data        reason why the next operation depends on the data, so that no graph can be compiled; None: it does not
    """

    needs: str | tuple[int, ...] = "none"
    reads_state: bool = False
    reads_relevance: bool = False
    reads_target: bool = False
    asks_data: str | None = None

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of the matrix products of one cut."""
        return 0


@runtime_checkable
class Score(Choice, Protocol):
    """Importance of each visual token by the group attentions (as far as `needs` goes): float32, higher stays."""

    needs: str | tuple[int, ...] = "group"

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Scalars: ...


@runtime_checkable
class Metric(Choice, Protocol):
    """Vectors "b v e" of the visual tokens, by which a select compares them."""

    needs: str | tuple[int, ...] = "last"

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Tensor: ...


@runtime_checkable
class Select(Choice, Protocol):
    """Visual tokens that stay, and the others that join them.

    Scores "b v" and metric "b v e" are None where the stage has none.
    """

    def __call__(self, scores: Any, metric: Any, keep: int, tokens: Tokens) -> Selection: ...


@runtime_checkable
class Reduce(Choice, Protocol):
    """The reduced tokens "b k d" and their sizes "b k", from all visual tokens: a linear map over the token axis."""

    def __call__(self, x: Tensor, size: Tensor, scores: Any, selection: Any) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Own(Choice):
    """A plain function, or an object that declares only some capabilities, as a choice that declares all of them."""

    call: Callable
    count: Callable[[CutSizes], int] | None = None
    needs: str | tuple[int, ...] = "none"
    reads_state: bool = False
    reads_relevance: bool = False
    reads_target: bool = False
    asks_data: str | None = None

    def __call__(self, *arguments):
        return self.call(*arguments)

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs that the object declares."""
        return 0 if self.count is None else self.count(sizes)


def declared(choice: Any, role: type) -> Any:
    """The choice; one that declares less than all gets the defaults of its role for the rest."""
    if choice is None or isinstance(choice, Choice):
        return choice
    capabilities = {name: getattr(choice, name, getattr(role, name)) for name in Choice.__annotations__}
    return Own(choice, getattr(choice, "flops", None), **capabilities)
