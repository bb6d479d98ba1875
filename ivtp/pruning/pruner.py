"""A pruner is four independent choices; a plan is a pruner per site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ivtp.pruning.attention import Attention
from ivtp.pruning.instruction import WORDS
from ivtp.pruning.reduces import Reduce, drop
from ivtp.pruning.schedules import Cut
from ivtp.pruning.scores import Score
from ivtp.pruning.selects import Select, top_k
from ivtp.pruning.tokens import Tokens

POSITIONS = ("keep", "renumber")
REFERENCES = ("last", "pseudo_cls", "visual_cls", "raters")
APPENDED = ("pseudo_cls", "visual_cls")


def keys(seen: list[Attention], tokens: Tokens) -> Tensor:
    """ToMe's metric: the keys of the current layer, mean over heads, of the visual tokens "b v e"."""
    return tokens.of_visual(seen[-1].keys())


def hidden(seen: list[Attention], tokens: Tokens) -> Tensor:
    """The visual tokens' hidden states "b v d"; before the first language layer: the projected features."""
    return tokens.of_visual(tokens.x)


hidden.needs = "none"


@dataclass(frozen=True)
class Pruner:
    """Score, select, reduce, schedule (and the metric a select may compare tokens by). Stateless.

    proportional  merged tokens count by their size in attention (log size added to their logits; arXiv 2210.09461)
    Any object with `schedule`, `proportional`, `reads_attention` and `cut` can stand in for it; `needs` and
    `reads_state` are asked for where they exist.
    """

    schedule: tuple[Cut, ...]
    score: Score | None = None
    select: Select = top_k
    reduce: Reduce = drop
    metric: Callable[[list[Attention], Tokens], Tensor] | None = None
    proportional: bool = False

    def __post_init__(self) -> None:
        if self.needs == "next" and not all(cut.after == "block" for cut in self.schedule):
            raise ValueError("the next layer's attention is asked for after a whole layer: use after='block'")
        if self.needs in ("group", "last"):
            layers = [cut.layer for cut in self.schedule]
            for before, layer in zip([-1, *layers], layers, strict=False):
                if layer == before:
                    raise ValueError(
                        f"the cut at layer {layer} has seen no attention "
                        + ("yet" if layer < 0 else "since the one before it")
                        + ", which its score or metric reads; cut in a later layer"
                    )

    @property
    def needs(self) -> str | tuple[int, ...]:
        """Which attentions a cut sees: of the "group" of layers since the last cut, of the "last" one, what the "next"
        layer would form, those of the layers in a tuple, or "none"."""
        asked = {"none" if self.score is None else getattr(self.score, "needs", "group")}
        asked.add("none" if self.metric is None else getattr(self.metric, "needs", "last"))
        asked -= {"none"} if len(asked) > 1 else set()
        if asked == {"group", "last"}:
            return "group"
        if len(asked) > 1:
            raise ValueError(f"score and metric of one pruner read different layers: {sorted(map(str, asked))}")
        return asked.pop()

    @property
    def reads_attention(self) -> bool:
        return self.needs != "none"

    @property
    def reads_state(self) -> bool:
        """True where hidden states after the model's last norm are compared."""
        return bool(getattr(self.select, "reads_state", False))

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
                  the prompt, gone after part 1), the projected "visual_cls" at the same place, or the "raters", the
                  prompt's words that look most at the image (arXiv 2410.04417)
    part1         number of leading language layers that the language pruner governs
    tau           relevance threshold of the pseudo CLS (Eq. 8)
    position_ids  "keep": kept tokens keep their RoPE position; "renumber": positions close up
    words         which words of the instruction make the pseudo CLS: see `ivtp.pruning.instruction.WORDS`
    image         rows and columns of patches that the image is shrunk to before the tower; None: it stays as it is
    """

    vision: Pruner | None = None
    language: Pruner | None = None
    reference: str = "last"
    part1: int = 0
    tau: float = 0.2
    position_ids: str = "keep"
    words: str = "te_rt"
    image: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("reference", self.reference, REFERENCES),
            ("position_ids", self.position_ids, POSITIONS),
            ("words", self.words, WORDS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if not isinstance(self.tau, (int, float)) or self.tau != self.tau:
            raise ValueError(
                f"tau={self.tau!r} is not a number; the cosine threshold lies in [-1, 1], the paper uses 0.2"
            )
        last = max((cut.layer for cut in self.language.schedule), default=0) if self.appends_reference else -1
        if self.part1 <= last:
            raise ValueError(
                f"part1={self.part1}: the {self.reference} judges up to language layer {last}, so it must stay for at "
                f"least {last + 1} layers"
            )

    @property
    def prunes(self) -> bool:
        """False where every token of every image stays."""
        return self.vision is not None or self.language is not None or self.image is not None

    @property
    def appends_reference(self) -> bool:
        """True where a reference token is appended to the prompt for part 1."""
        return self.language is not None and self.reference in APPENDED

    @property
    def reads_relevance(self) -> bool:
        """True where the language pruner asks how well each visual token fits the instruction in CLIP's joint space."""
        return bool(self.language is not None and getattr(self.language.score, "reads_relevance", False))

    @property
    def reads_truth(self) -> bool:
        """True for an oracle, which has to be told what each question is about."""
        return bool(self.language is not None and getattr(self.language.score, "reads_truth", False))

    @property
    def reads_clip(self) -> bool:
        """True where the CLIP text encoder reads the instruction to make the pseudo CLS."""
        return self.appends_reference and self.reference == "pseudo_cls" and self.words in ("te", "te_rt")

    @property
    def needs_guide(self) -> bool:
        """True where the CLIP text encoder that is paired with the tower has to read the instruction."""
        return self.reads_relevance or (self.appends_reference and self.reference == "pseudo_cls")

    def appends_to(self, visual: int) -> bool:
        """Whether a reference is appended when `visual` tokens reach the language model: not where all of them stay."""
        return self.appends_reference and self.cuts_language(visual)

    def cuts_language(self, visual: int) -> bool:
        """Whether any of `visual` tokens that reach the language model leave inside it."""
        return self.language is not None and any(cut.keep < visual for cut in self.language.schedule)

    def leaving(self, patches: int, crops: int = 1) -> int:
        """Visual tokens that leave the tower, of `crops` crops of so many patches."""
        cuts = self.vision.schedule if self.vision is not None else ()
        return crops * (cuts[-1].keep if cuts else patches)

    def reached_by(self, tokens: int) -> Plan:
        """The same with no cut in the language model that asks for more than the `tokens` that reach it: shares are
        rounded to whole tokens on each site apart."""
        if self.language is None:
            return self
        cuts = tuple(replace(cut, keep=min(cut.keep, tokens)) for cut in self.language.schedule)
        return replace(self, language=replace(self.language, schedule=cuts))

    @property
    def final(self) -> int | None:
        """Visual tokens after the last cut; None where nothing is cut."""
        for pruner in (self.language, self.vision):
            if pruner is not None and pruner.schedule:
                return pruner.schedule[-1].keep
        return None
