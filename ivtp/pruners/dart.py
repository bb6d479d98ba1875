"""DART: tokens that duplicate a few pivots are dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ivtp.core import Attention, CutSizes, Metric, Plan, Select, Selection, Shape, Stage, Tokens
from ivtp.core.selects import cosines, descending
from ivtp.core.tokens import indices, take
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import before_language


@register_pruner
def dart(shape: Shape, keep: int, layer: int = 2, image_pivots: int = 4, text_pivots: int = 4) -> Plan:
    """DART (arXiv 2502.11494): after `layer` language layers, the tokens least like a few pivots stay; no attention map.

    Scores     L1 norm of the keys (after RoPE, all heads) chooses pivots: 4 image tokens and 4 of the text behind them
    Selects    the image pivots; then every pivot in turn takes the tokens that are least like it (cosine of hidden
               states after the model's last norm), an equal number each, from those that are left
    The rest   is dropped; earlier layers keep its keys and values
    Where      once, before language layer 2 (0-based)
    Budgets    192, 128, 64 of 576 (published)

    Published code: a fixed number per pivot, the paper has a threshold (code followed); it leaves a remainder unused (22
    tokens become 20), here the first pivots take one more, so that the budget is met. The pivots take
    their turn in the order of a CPython set of their places, and compete, so that order matters (followed). It
    applies the choice of the first sample of a batch to all (a bug; here every sample has its own). Positions stay.
    """
    cut = before_language(shape, "dart", layer, keep)
    if image_pivots < 0 or text_pivots < 0 or image_pivots + text_pivots < 1:
        raise ValueError(f"image_pivots={image_pivots} and text_pivots={text_pivots}: at least one pivot is needed")
    if keep < image_pivots:
        raise ValueError(f"keep={keep}, but dart keeps its {image_pivots} image pivots; keep more, or set image_pivots")
    select = UnlikePivots(image_pivots, text_pivots)
    return Plan(language=Stage(cut, select=select, metric=KeyNorms()))


@dataclass(frozen=True)
class KeyNorms(Metric):
    """L1 norm of the keys of every token of the sequence "b n", all heads together."""

    def __call__(self, attentions: list[Attention], tokens: Tokens) -> Tensor:
        return attentions[-1].k.float().abs().sum(dim=(1, 3))


@dataclass(frozen=True)
class UnlikePivots(Select):
    """The pivots with the largest keys, and the tokens least like them, in sequence order."""

    image_pivots: int = 4
    text_pivots: int = 4
    reads_state = True
    asks_data = "its pivots take their turn in the order of a Python set of their places"

    def __call__(self, scores: None, metric: Tensor, keep: int, tokens: Tokens) -> Selection:
        assert tokens.state is not None
        image, text = self.pivots(metric, tokens)
        places = visit_order(torch.cat([image, text], 1), tokens.valid)
        count = places.shape[1]
        likeness = cosines(take(tokens.state, places), tokens.of_visual(tokens.state))

        visual = tokens.visual_index
        chosen = (visual[:, :, None] == image[:, None]).any(2)
        gone = ~tokens.of_visual(tokens.valid)
        each, more = divmod(keep - self.image_pivots, count)
        for turn in range(count):
            quota = each + (turn < more)
            if quota:
                left = likeness[:, turn].masked_fill(chosen, torch.inf).masked_fill(gone & ~chosen, 2.0)
                chosen = chosen.scatter(1, left.argsort(dim=1, stable=True)[:, :quota], True)
        return Selection(indices(chosen, keep))

    def pivots(self, norms: Float[Tensor, "b n"], tokens: Tokens) -> tuple[Int[Tensor, "b p"], Int[Tensor, "b q"]]:
        """Places in the sequence of the image pivots and of the text pivots, the largest first.

        A prompt with fewer words behind its image than text pivots takes words before it.
        """
        place = torch.arange(norms.shape[1], device=norms.device)[None]
        behind = place > tokens.visual_index.amax(1, keepdim=True)
        image = norms.masked_fill(~(tokens.visual & tokens.valid), -1.0)
        text = torch.where(behind, norms, norms - norms.amax() - 1).masked_fill(
            tokens.visual | ~tokens.valid, -torch.inf
        )
        return descending(image)[:, : self.image_pivots], descending(text)[:, : self.text_pivots]

    def flops(self, sizes: CutSizes) -> int:
        """FLOPs of the cosines with the pivots."""
        return 2 * (self.image_pivots + self.text_pivots) * sizes.v * sizes.width


def visit_order(places: Int[Tensor, "b p"], valid: Bool[Tensor, "b n"]) -> Int[Tensor, "b p"]:
    """The pivots in the order in which CPython iterates over the set of their places, padding not counted."""
    numbers = (valid.long().cumsum(1) - 1).gather(1, places).tolist()
    # A handful of numbers per sample; nothing but a set iterates just like a set.
    turns = [[row.index(number) for number in set(row)] for row in numbers]
    return places.gather(1, torch.tensor(turns, device=places.device))
