"""FLOPs in the conventions that papers publish for the same model, so that their numbers can be told apart.

For LLaVA-1.5-7B with 576 visual tokens, unpruned, "TFLOPs" means 3.82, 5.97, 7.65 or 15.4 depending on who counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ivtp.core.flops import Cost, Shape, cost
from ivtp.core.plan import NOTHING, Plan, Stage
from ivtp.core.schedule import Schedule
from ivtp.core.scores import Random


@dataclass(frozen=True)
class Convention:
    """A way to count FLOPs: of the language model's layers alone, over its visual tokens alone.

    per_mac       1: multiply-accumulates; 2: FLOPs
    ffn_matrices  2: as if the FFN were not gated; 3: all of them
    others        tokens counted beside the visual ones
    """

    per_mac: int
    ffn_matrices: int
    others: int = 0

    def count(self, shape: Shape, plan: Plan) -> int:
        """Operations of one prefill: per layer 4nd² + 2n²d + m·ndf, n tokens that enter it (behind a cut before the FFN:
        its FFN's fewer). Grouped key-value heads are counted as they are, so 4nd² is less where heads are shared."""
        stack = shape.language
        if stack is None:
            raise ValueError("this convention counts a language model, but this model has none")
        total, schedule = 0, (plan.language or NOTHING).schedule
        for step in schedule.walk(stack.depth, plan.leaving(shape.patches, shape.crops)):
            total += stack.attention(step.entering + self.others)
            total += stack.mlp(step.in_ffn + self.others) * self.ffn_matrices // stack.ffn_matrices
        return total // 2 * self.per_mac


CONVENTIONS = {
    "macs": Convention(per_mac=1, ffn_matrices=3),  # 3.82 T for 7B
    "two_matrices": Convention(per_mac=2, ffn_matrices=2),  # 5.97 T
    "one_more": Convention(per_mac=2, ffn_matrices=3, others=1),  # 7.65 T
}
"""Conventions by name; "run" and "paper" are those of `ivtp.core.flops.cost`: everything, 2 × MAC, with the text (15.4 T)."""


def resampler(shape: Shape, keep: int, text: int = 512, convention: str = "run") -> tuple[Plan, Cost]:
    """Cost of a trained resampler in place of the projector, in the manner of Qwen-VL (arXiv 2308.12966): one layer of
    cross attention from `keep` queries to all patches, in the width of the language model, which then reads `keep`.

    It is for cost alone: there are no weights to run it with. The plan only holds where tokens leave.
    """
    if shape.language is None:
        raise ValueError("a resampler stands before a language model, but this model has none")
    plan = Plan(language=Stage(Schedule.at([-1], [keep], "block"), Random()))
    width, n = shape.language.width, shape.tokens
    into_width = 2 * n * shape.projector_in * width
    keys_values = 4 * n * width * width
    queries_output = 4 * keep * width * width
    maps = 4 * keep * n * width
    spent = cost(shape, plan, text, convention=convention)
    return plan, replace(spent, projector=into_width + keys_values + queries_output + maps)
