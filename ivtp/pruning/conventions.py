"""FLOPs in the conventions that papers publish for the same model, so that their numbers can be told apart.

For LLaVA-1.5-7B with 576 visual tokens, unpruned, "TFLOPs" means 3.82, 5.97, 7.65 or 15.4 depending on who counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ivtp.pruning.cost import Cost, Shape, cost
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.schedules import Cut
from ivtp.pruning.scores import Chance


@dataclass(frozen=True)
class Convention:
    """Counts the language model's layers alone, over its visual tokens alone.

    per_mac       1: multiply-accumulates; 2: FLOPs
    ffn_matrices  2: as if the FFN were not gated; 3: all of them
    others        tokens counted beside the visual ones
    """

    about: str
    per_mac: int
    ffn_matrices: int
    others: int = 0

    def count(self, shape: Shape, plan: Plan) -> int:
        """Operations of one prefill: per layer 4nd² + 2n²d + m·ndf, n tokens that enter it (behind a cut before the FFN:
        its FFN's fewer). Grouped key-value heads are counted as they are, so 4nd² is less where heads are shared."""
        stack = shape.language
        if stack is None:
            raise ValueError("this convention counts a language model, but this model has none")
        v = shape.tokens
        if plan.vision is not None and plan.vision.schedule:
            v = shape.crops * plan.vision.schedule[-1].keep
        cuts = {(cut.layer, cut.after): cut.keep for cut in (plan.language.schedule if plan.language else ())}
        v = cuts.get((-1, "block"), v)
        total = 0
        for layer in range(stack.depth):
            total += stack.attention(v + self.others)
            v = cuts.get((layer, "attn"), v)
            total += stack.mlp(v + self.others) * self.ffn_matrices // stack.ffn_matrices
            v = cuts.get((layer, "block"), v)
        return total // 2 * self.per_mac


CONVENTIONS = {
    "macs": Convention("MACs of the LLM, visual tokens only (3.82 T for 7B)", 1, 3),
    "two_matrices": Convention("FLOPs of the LLM with 2 of the 3 FFN matrices, visual tokens only (5.97 T)", 2, 2),
    "one_more": Convention("FLOPs of the LLM, visual tokens and one more (7.65 T)", 2, 3, 1),
}
"""Beside "paper", the convention of `ivtp.pruning.cost`: everything, 2 × MAC, with the text (15.4 T)."""


def resampler(shape: Shape, keep: int, text: int = 512) -> tuple[Plan, Cost]:
    """What a trained resampler in the manner of Qwen-VL (arXiv 2308.12966) costs in place of the projector: one layer of
    cross attention from `keep` queries to all patches, in the width of the language model, which then reads `keep`.

    It is for cost alone: there are no weights to run it with. The plan stands in for where tokens leave.
    """
    if shape.language is None:
        raise ValueError("a resampler stands before a language model, but this model has none")
    plan = Plan(language=Pruner((Cut(-1, keep, "block"),), Chance()))
    width, n = shape.language.width, shape.tokens
    into_width = 2 * n * shape.projector_in * width
    keys_values = 4 * n * width * width
    queries_output = 4 * keep * width * width
    maps = 4 * keep * n * width
    return plan, replace(cost(shape, plan, text), projector=into_width + keys_values + queries_output + maps)
