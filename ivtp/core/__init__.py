"""The core: tokens, attention, the four choices of a stage, and the loop. Imports torch and nothing of the rest.

Dims, here and everywhere: b batch · h heads · g key-value heads · n tokens · m attended to · a reference tokens ·
v visual · k kept · d width · e head width.
"""

from ivtp.core.attention import Attention
from ivtp.core.choices import CutSizes, Metric, Reduce, Score, Select
from ivtp.core.flops import Shape
from ivtp.core.plan import Plan, Stage
from ivtp.core.schedule import Cut, Schedule
from ivtp.core.tokens import Selection, Tokens

__all__ = ["Attention", "Cut", "CutSizes", "Metric", "Plan", "Reduce", "Schedule"]
__all__ += ["Score", "Select", "Selection", "Shape", "Stage", "Tokens"]
