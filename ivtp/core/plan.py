"""A stage is four independent choices; a plan is a stage per site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ivtp.core.attention import Attention
from ivtp.core.choices import Choice, Metric, Reduce, Score, Select, declared
from ivtp.core.guidance import WORDS
from ivtp.core.reduces import Drop
from ivtp.core.schedule import Cut, Schedule
from ivtp.core.selects import TopK
from ivtp.core.tokens import Tokens
from ivtp.registry import check_choice

POSITIONS = ("keep", "renumber")
REFERENCES = ("last", "pseudo_cls", "visual_cls", "raters")
APPENDED = ("pseudo_cls", "visual_cls")


@dataclass(frozen=True, init=False)
class Stage:
    """Pruning at one site: score, select, reduce, schedule (and the metric by which a select may compare tokens). Stateless.

    By default the highest scores stay, and the other tokens are dropped. A plain function may stand for a choice: a score
    then reads the "group", a metric the "last" of its attentions. A class declares what it reads
    (`ivtp.core.choices.Choice`).

    schedule      a Schedule, or a sequence of its cuts
    proportional  merged tokens count by their size in attention (log size added to their logits; arXiv 2210.09461)
    """

    schedule: Schedule
    score: Score | None
    select: Select
    reduce: Reduce
    metric: Metric | None
    proportional: bool

    def __init__(
        self,
        schedule: Schedule | Sequence[Cut],
        score: Score | Callable | None = None,
        select: Select | Callable | None = None,
        reduce: Reduce | Callable | None = None,
        metric: Metric | Callable | None = None,
        proportional: bool = False,
    ) -> None:
        fields = {
            "schedule": schedule if isinstance(schedule, Schedule) else Schedule(tuple(schedule)),
            "score": declared(score, Score),
            "select": TopK() if select is None else declared(select, Select),
            "reduce": Drop() if reduce is None else declared(reduce, Reduce),
            "metric": declared(metric, Metric),
            "proportional": proportional,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self.schedule.check_needs(self.needs)

    @property
    def choices(self) -> list[Choice]:
        """Score, select, reduce and metric, as far as they are there."""
        return [choice for choice in (self.score, self.select, self.reduce, self.metric) if choice is not None]

    @property
    def needs(self) -> str | tuple[int, ...]:
        """Attentions that a cut reads, as in `Choice.needs`."""
        needs = {choice.needs for choice in self.choices} - {"none"} or {"none"}
        if needs == {"group", "last"}:
            return "group"
        if len(needs) > 1:
            raise ValueError(f"score and metric of one stage read different layers: {sorted(map(str, needs))}")
        return needs.pop()

    @property
    def reads_state(self) -> bool:
        """True where a cut reads hidden states after the model's last norm."""
        return any(choice.reads_state for choice in self.choices)

    @property
    def reads_relevance(self) -> bool:
        """True where a cut reads how well each visual token fits the instruction in CLIP's joint space."""
        return any(choice.reads_relevance for choice in self.choices)

    @property
    def reads_target(self) -> bool:
        """True where a cut reads ground truth: an oracle."""
        return any(choice.reads_target for choice in self.choices)

    @property
    def asks_data(self) -> str | None:
        """Reason why an operation of a cut depends on the data, so that no graph can be compiled; None: none does."""
        return next((choice.asks_data for choice in self.choices if choice.asks_data), None)

    def cut(self, tokens: Tokens, attentions: list[Attention], keep: int) -> Tokens:
        """Shorten to `keep` visual tokens by the group attentions."""
        scores = None if self.score is None else self.score(attentions, tokens)
        metric = None if self.metric is None else self.metric(attentions, tokens)
        selection = self.select(scores, metric, keep, tokens)
        return tokens.keep(selection, self.reduce, scores)


NOTHING = Stage(Schedule())
"""A stage without cuts."""


@dataclass(frozen=True)
class Plan:
    """A method: its stages in the vision tower and in the language model.

    reference     reference tokens inside the language model: the "last" prompt token, the paper's "pseudo_cls" (appended
                  after the prompt, gone after part 1), the projected "visual_cls" at the same place, or the "raters",
                  the prompt's words that are most like the image (arXiv 2410.04417)
    part1         number of leading language layers in which the appended reference token stays
    tau           relevance threshold of the pseudo CLS (Eq. 8)
    position_ids  "keep": kept tokens keep their RoPE position; "renumber": positions close up
    words         which words of the instruction make the pseudo CLS: see `ivtp.core.guidance.WORDS`
    image         rows and columns of patches that the image is shrunk to before the tower; None: it stays as it is
    """

    vision: Stage | None = None
    language: Stage | None = None
    reference: str = "last"
    part1: int = 0
    tau: float = 0.2
    position_ids: str = "keep"
    words: str = "te_rt"
    image: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_choice("reference", self.reference, REFERENCES)
        check_choice("position_ids", self.position_ids, POSITIONS)
        check_choice("words", self.words, WORDS)
        if not isinstance(self.tau, (int, float)) or self.tau != self.tau:
            raise ValueError(
                f"tau={self.tau!r} is not a number; the cosine threshold lies in [-1, 1], the paper uses 0.2"
            )
        last = -1
        if self.language is not None and self.appends_reference:
            last = max((cut.layer for cut in self.language.schedule), default=0)
        if self.part1 <= last:
            raise ValueError(
                f"part1={self.part1}: the {self.reference} scores tokens up to language layer {last}, so it must stay for "
                f"at least {last + 1} layers"
            )

    @property
    def prunes(self) -> bool:
        """True where any token of any image may leave."""
        return self.vision is not None or self.language is not None or self.image is not None

    @property
    def appends_reference(self) -> bool:
        """True where a reference token is appended to the prompt for part 1."""
        return self.language is not None and self.reference in APPENDED

    @property
    def site(self) -> str:
        """Site at which tokens leave: "image" (it is shrunk), "vision", "language", "both" or "none"."""
        if self.image is not None:
            return "image"
        if self.vision is None:
            return "none" if self.language is None else "language"
        return "vision" if self.language is None else "both"

    @property
    def reads_relevance(self) -> bool:
        """True where the language stage reads how well each visual token fits the instruction in CLIP's joint space."""
        return self.language is not None and self.language.reads_relevance

    @property
    def reads_target(self) -> bool:
        """True where the language stage is an oracle, which reads the target patches of each question."""
        return self.language is not None and self.language.reads_target

    @property
    def reads_clip(self) -> bool:
        """True where the CLIP text encoder reads the instruction to make the pseudo CLS."""
        return self.appends_reference and self.reference == "pseudo_cls" and self.words in ("te", "te_rt")

    @property
    def needs_guide(self) -> bool:
        """True where the CLIP text encoder that is paired with the tower has to read the instruction."""
        return self.reads_relevance or (self.appends_reference and self.reference == "pseudo_cls")

    @property
    def reads_text(self) -> bool:
        """True where the CLIP text encoder itself reads the instruction, and not its tokenizer alone."""
        return self.reads_clip or self.reads_relevance

    def appends_to(self, visual: int) -> bool:
        """True where a reference token is appended when `visual` tokens reach the language model: not if all of them stay."""
        return self.appends_reference and self.cuts_language(visual)

    def cuts_language(self, visual: int) -> bool:
        """True where any of `visual` tokens that reach the language model leave inside it."""
        return self.language is not None and self.language.schedule.shortens(visual)

    def leaving(self, patches: int, crops: int = 1) -> int:
        """Visual tokens that leave the tower, of `crops` crops of so many patches."""
        return crops * (patches if self.vision is None else self.vision.schedule.final(patches))

    def reached_by(self, tokens: int) -> Plan:
        """The same plan with at most `tokens` at every cut in the language model: shares are rounded to whole tokens on
        each site apart, so that fewer may reach it than a cut keeps."""
        if self.language is None:
            return self
        return self.keeping((), [min(cut.keep, tokens) for cut in self.language.schedule])

    def keeping(self, vision: Sequence[int] = (), language: Sequence[int] = ()) -> Plan:
        """The same plan with these counts at the cuts of a stage; none given: its own.

        For methods that keep a different number per image: with the counts of one image, its cost without the padding
        that a batch puts between tokens. `[int(cut.valid[i].sum()) for cut in run.trace.vision]` are those of image i.
        """

        def counted(stage: Stage | None, counts: Sequence[int]) -> Stage | None:
            return replace(stage, schedule=stage.schedule.keeping(counts)) if stage is not None and counts else stage

        return replace(self, vision=counted(self.vision, vision), language=counted(self.language, language))

    @property
    def final(self) -> int | None:
        """Visual tokens after the last cut; None where nothing is cut."""
        for stage in (self.language, self.vision):
            if stage is not None and len(stage.schedule):
                return stage.schedule[-1].keep
        return None
