"""Closed-form cost: FLOPs = 2 × MAC of all matrix products of a prefill, known before the first image.

Batch 1, attention counted in full (not halved for causality), the LM head on every position, the patch convolution
included. By default the layers that are run are counted; `convention="paper"` counts all layers of the tower, also those
whose output nobody reads, which gives the IVTP paper's own numbers. Maps are taken as given, as in eager attention;
`streamed=True` adds what scores cost when no map is formed, which is what this package really executes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt

from ivtp.core.choices import CutSizes
from ivtp.core.plan import NOTHING, Plan, Stage
from ivtp.core.schedule import Step
from ivtp.registry import check_choice

COUNTED = ("run", "paper")
"""Conventions of `cost`; those of other papers are in `ivtp.core.conventions`."""


@dataclass(frozen=True)
class Layers:
    """A stack of transformer layers; `ffn_matrices` is 2 for an MLP, 3 for a gated one.

    windows  in how many windows of equal size the layers attend, each for itself, except those in `whole`; what is left
             after a cut is taken to be spread evenly over them
    """

    depth: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_matrices: int
    windows: int = 1
    whole: tuple[int, ...] = ()

    def attention(self, n: int, layer: int = 0) -> int:
        """FLOPs of projections, logits and weighted values of n tokens."""
        projections = 4 * n * self.width * (self.heads + self.kv_heads) * self.head_width
        windows = 1 if layer in self.whole else self.windows
        return projections + 4 * n * n * self.heads * self.head_width // windows

    def qkv(self, n: int) -> int:
        """FLOPs of the projections to queries, keys and values."""
        return 2 * n * self.width * (self.heads + 2 * self.kv_heads) * self.head_width

    def mlp(self, n: int) -> int:
        """FLOPs of the FFN."""
        return 2 * self.ffn_matrices * n * self.width * self.ffn

    def pooling(self, n: int) -> int:
        """One learned query over n tokens, then the MLP on its output."""
        width = self.heads * self.head_width
        projections = 4 * self.width * width + 4 * n * self.width * self.kv_heads * self.head_width
        return projections + 4 * n * width + self.mlp(1)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that pruning and its cost depend on.

    patches       visual tokens of one image, or of one of its crops, before pruning
    patch_inputs  numbers in one patch (3 × side²)
    prefix        tokens before the patches (class token, registers)
    has_cls       one of them is a class token; else all patches are reference tokens
    pool          attention pooling of what is left, behind the layers; pool_prefix: so many tokens before it read too
    classes       width of what is made of one vector behind them: a classifier, or the joint space of a dual encoder
    projector_in  width of what the projector reads (several feature layers are joined)
    projector_hidden  width between its two matrices; 0: the language model's
    text          the CLIP text encoder that is paired with the vision tower; joint: width of their common space
    columns       patches in one row of the image; 0: as many as rows
    unit          patches of the tower that become one visual token (a patch merger, pixel shuffle), kept or cut together
    crops         pieces of the image that go through the tower one by one
    separators    tokens of the image that carry no patch (the newlines behind rows of crops) and are never cut
    read          leading tower layers whose output leaves the tower, 0: all; later ones run as far as a cut needs them
    taps          tower layers whose output the language model gets too, each through a merger of its own (DeepStack)
    by_image      what is here is of an image of the usual size; others have other numbers of tokens
    resizable     the tower also reads a shrunk image
    """

    vision: Layers
    patches: int
    patch_inputs: int
    prefix: int = 1
    has_cls: bool = True
    pool: Layers | None = None
    pool_prefix: int = 0
    classes: int = 0
    projector_in: int = 0
    language: Layers | None = None
    vocabulary: int = 0
    text: Layers | None = None
    text_context: int = 77
    joint: int = 0
    columns: int = 0
    unit: int = 1
    crops: int = 1
    separators: int = 0
    projector_hidden: int = 0
    read: int = 0
    taps: tuple[int, ...] = ()
    by_image: bool = False
    resizable: bool = True

    @property
    def tokens(self) -> int:
        """Visual tokens of one whole image."""
        return self.patches * self.crops

    def in_one_crop(self, tokens: int) -> Shape:
        """The same model for an image of one crop with this number of visual tokens, in one row."""
        return replace(self, crops=1, patches=tokens, columns=tokens)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; raises ValueError where they are not known."""
        columns = self.columns or isqrt(self.patches)
        if self.patches % columns:
            raise ValueError(f"{self.patches} patches do not make a square grid, and its columns are not known")
        return self.patches // columns, columns


@dataclass(frozen=True)
class Cost:
    """FLOPs of one prefill per part, and the visual tokens: before pruning, then after every cut."""

    vision: int
    projector: int
    language: int
    text_encoder: int
    pruner: int
    tokens: tuple[int, ...]
    average_tokens: float | None = None
    """Visual tokens that enter a language layer (and stay in its key-value cache), mean over the layers."""

    @property
    def extra(self) -> int:
        """FLOPs that the method adds to the model: the CLIP text pass and the scores."""
        return self.text_encoder + self.pruner

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return self.vision + self.projector + self.language + self.extra

    def tflops(self) -> dict[str, float]:
        """TFLOPs of each part and in total."""
        parts = ("vision", "projector", "language", "extra", "total")
        return {part: getattr(self, part) / 1e12 for part in parts}


def cost(
    shape: Shape,
    plan: Plan,
    text: int = 512,
    instruction: int | None = None,
    streamed: bool = False,
    convention: str = "run",
) -> Cost:
    """Cost of one image with `text` prompt tokens around it.

    instruction  tokens that the CLIP text encoder reads, its begin and end marks included; default: one full context
    convention   "run": the layers that are run; "paper": all layers of the tower, as papers count

    >>> import ivtp
    >>> from transformers import LlavaConfig  # its defaults are the sizes of LLaVA-1.5-7B
    >>> shape = ivtp.shape_of(LlavaConfig())
    >>> plans = ivtp.Plan(), ivtp.load_pruner("ivtp", shape, keep=64)
    >>> [round(cost(shape, plan, convention="paper").total / 1e12, 3) for plan in plans]
    [15.404, 8.197]
    >>> [round(cost(shape, plan).total / 1e12, 3) for plan in plans]
    [15.388, 8.195]
    """
    check_choice("convention", convention, COUNTED)
    if convention == "paper":
        shape = replace(shape, read=0)
    patches = Entering(shape.patches, shape.prefix, shape.unit)
    tower = stack_cost(shape.vision, plan.vision, patches, "vision", shape.has_cls, shape.read)
    vision, scores, v = tower.layers, tower.scores, tower.counts[-1]
    patches = plan.image[0] * plan.image[1] if plan.image else shape.patches
    vision += 2 * patches * shape.unit * shape.patch_inputs * shape.vision.width
    vision += 2 * shape.vision.width * shape.classes
    if shape.pool is not None:
        vision += shape.pool.pooling(shape.pool_prefix + v)
    counts = tuple(shape.crops * count for count in tower.counts)
    vision, scores, v = shape.crops * vision, shape.crops * scores, shape.crops * v
    projector = language = text_encoder = 0
    average = None
    if shape.language is not None:
        width = shape.language.width
        hidden = shape.projector_hidden or width
        project = shape.projector_in * hidden + hidden * width
        projector = 2 * project * v
        vision += 2 * project * shape.crops * sum(tower.steps[tap].leaving for tap in shape.taps)
        appends = plan.appends_to(v)
        others = text + shape.separators
        entering = Entering(v, others, appended=plan.part1 if appends else 0)
        decoder = stack_cost(shape.language, plan.language, entering, "language")
        average = sum(step.entering for step in decoder.steps) / len(decoder.steps)
        language = decoder.layers + 2 * (decoder.counts[-1] + others) * width * shape.vocabulary
        scores += decoder.scores
        counts += decoder.counts[1:]
        if plan.cuts_language(v) and plan.reference == "raters":
            scores += 2 * v * text * width  # the words' likeness to the image
        if appends:
            text_encoder = 2 * project  # the projected visual CLS
        if appends and plan.reads_clip:
            text_encoder += _text_pass(shape, instruction, 1)
            text_encoder += _class_token(shape, plan.vision or NOTHING, v // shape.crops) if shape.has_cls else 0
        if plan.cuts_language(v) and plan.reads_relevance:
            text_encoder += _text_pass(shape, instruction, v)
    return Cost(vision, projector, language, text_encoder, scores if streamed else 0, counts, average)


@dataclass(frozen=True)
class Entering:
    """Tokens that enter a stack: `visual` ones of `unit` patches each, `others` beside them, and one more in the first
    `appended` layers."""

    visual: int
    others: int
    unit: int = 1
    appended: int = 0

    def length(self, layer: int, visual: int) -> int:
        """Tokens of the sequence in a layer, when so many visual ones are left."""
        return self.others + (0 <= layer < self.appended) + self.unit * visual


@dataclass(frozen=True)
class StackCost:
    """FLOPs of the layers of a stack and of its cuts; the visual tokens before it and behind every cut; its walk."""

    layers: int
    scores: int
    counts: tuple[int, ...]
    steps: list[Step]


def stack_cost(
    stack: Layers, stage: Stage | None, entering: Entering, site: str, one_reference: bool = True, read: int = 0
) -> StackCost:
    """Cost of the layers of a stack that are run, and of the cuts of its stage.

    one_reference  False: all visual tokens are reference tokens, where there is no class token
    read           leading layers whose output is read; 0: all
    """
    stage = NOTHING if stage is None else stage
    schedule = stage.schedule
    schedule.check(entering.visual, stack.depth, site)
    steps = schedule.walk(stack.depth, entering.visual)
    attended, fed = schedule.reach(read or stack.depth)
    layers = sum(stack.attention(entering.length(step.layer, step.entering), step.layer) for step in steps[:attended])
    layers += sum(stack.mlp(entering.length(step.layer, step.in_ffn)) for step in steps[:fed])
    scores, previous, counts = 0, -1, [entering.visual]
    for cut in schedule:
        if cut.keep < (v := counts[-1]):
            sizes = CutSizes(
                group=cut.layer - previous,
                n=entering.length(cut.layer, v),
                v=v,
                keep=cut.keep,
                references=1 if one_reference else v,
                heads=stack.heads,
                kv_heads=stack.kv_heads,
                head_width=stack.head_width,
                width=stack.width,
            )
            scores += sum(choice.flops(sizes) for choice in stage.choices)
            scores += stack.qkv(sizes.n) if stage.needs == "next" else 0
        previous = cut.layer
        counts.append(cut.keep)
    return StackCost(layers, scores, tuple(counts), steps)


def _class_token(shape: Shape, stage: Stage, visual: int) -> int:
    """The class token of one crop behind the tower: the layers that were not run, the last of them for its query alone."""
    stack, n = shape.vision, shape.prefix + shape.unit * visual
    attended, fed = stage.schedule.reach(shape.read or stack.depth)
    last = stack.depth - 1
    spent = sum(stack.attention(n, layer) for layer in range(attended, last)) + max(0, last - fed) * stack.mlp(n)
    if attended <= last:
        spent += stack.qkv(n) + stack.attention(1) + 4 * (n - 1) * stack.heads * stack.head_width
    return spent + (stack.mlp(1) if fed <= last else 0)


def _text_pass(shape: Shape, instruction: int | None, visual: int) -> int:
    """The CLIP text encoder over the instruction, in chunks of its context, and the projections of its tokens and of
    `visual` vectors of the tower into the joint space."""
    if shape.text is None:
        return 0
    instruction = instruction or shape.text_context
    # Chunks go through together, each with marks of its own, as long as the longest.
    chunks = -(-max(instruction - 2, 1) // (shape.text_context - 2))
    n = min(instruction, shape.text_context)
    encoder = shape.text.depth * (shape.text.attention(n) + shape.text.mlp(n)) + 2 * n * shape.text.width * shape.joint
    return 2 * visual * shape.vision.width * shape.joint + chunks * encoder
