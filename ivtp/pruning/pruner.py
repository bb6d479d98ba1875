"""A pruner is four independent choices; a plan is a pruner per site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ivtp.pruning.attention import Attention
from ivtp.pruning.reduces import Reduce, drop
from ivtp.pruning.schedules import Cut
from ivtp.pruning.scores import Score
from ivtp.pruning.selects import Select, top_k
from ivtp.pruning.tokens import Tokens

POSITIONS = ("keep", "renumber")
REFERENCES = ("last", "pseudo_cls", "visual_cls")


def keys(seen: list[Attention], tokens: Tokens) -> Tensor:
    """ToMe's metric: the keys of the current layer, mean over heads, of the visual tokens "b v e"."""
    return tokens.of_visual(seen[-1].keys())


@dataclass(frozen=True)
class Pruner:
    """Score, select, reduce, schedule (and the metric a select may compare tokens by). Stateless.

    proportional  merged tokens count by their size in attention (log size added to their logits; arXiv 2210.09461)
    Any object with `schedule`, `proportional`, `reads_attention` and `cut` can stand in for it.
    """

    schedule: tuple[Cut, ...]
    score: Score | None = None
    select: Select = top_k
    reduce: Reduce = drop
    metric: Callable[[list[Attention], Tokens], Tensor] | None = None
    proportional: bool = False

    @property
    def reads_attention(self) -> bool:
        return self.metric is not None or (self.score is not None and self.score.needs != "none")

    def cut(self, tokens: Tokens, seen: list[Attention], keep: int) -> Tokens:
        """Shorten to `keep` visual tokens by the attention of the layers since the last cut."""
        scores = None if self.score is None else self.score(seen, tokens)
        metric = None if self.metric is None else self.metric(seen, tokens)
        selection = self.select(scores, metric, keep, tokens)
        return tokens.keep(selection, self.reduce, scores)


@dataclass(frozen=True)
class Plan:
    """A method: what happens in the vision tower, what in the language model.

    reference     who judges inside the language model: the "last" prompt token, the paper's "pseudo_cls" (appended after
                  the prompt, gone after part 1), or the projected "visual_cls" at the same place
    part1         number of leading language layers that the language pruner governs
    tau           relevance threshold of the pseudo CLS (Eq. 8)
    position_ids  "keep": kept tokens keep their RoPE position; "renumber": positions close up
    """

    vision: Pruner | None = None
    language: Pruner | None = None
    reference: str = "last"
    part1: int = 0
    tau: float = 0.2
    position_ids: str = "keep"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("reference", self.reference, REFERENCES),
            ("position_ids", self.position_ids, POSITIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if not isinstance(self.tau, (int, float)) or self.tau != self.tau:
            raise ValueError(
                f"tau={self.tau!r} is not a number; the cosine threshold lies in [-1, 1], the paper uses 0.2"
            )

    @property
    def appends_reference(self) -> bool:
        """True where a reference token is appended to the prompt for part 1."""
        return self.language is not None and self.reference != "last"

    @property
    def final(self) -> int | None:
        """Visual tokens after the last cut; None where nothing is cut."""
        for pruner in (self.language, self.vision):
            if pruner is not None and pruner.schedule:
                return pruner.schedule[-1].keep
        return None
