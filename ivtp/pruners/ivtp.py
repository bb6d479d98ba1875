"""IVTP (ECCV 2024), both stages."""

from __future__ import annotations

import warnings

from ivtp.core import Plan, Shape, Stage
from ivtp.core.scores import Layerwise, Random, Rollout, TargetFirst
from ivtp.pruners import register_pruner
from ivtp.pruners.default_layers import at_both_sites, both_ends, check_vision_keep
from ivtp.registry import check_choice


@register_pruner
def ivtp(
    shape: Shape,
    keep: int,
    group: int | str = 3,
    language_group: int | str = 3,
    tau: float = 0.2,
    combine: str = "residual",
    value_norm: bool = True,
    reference: str = "pseudo_cls",
    part1: int | None = None,
    vision_keep: int | None = None,
    split: float | None = None,
    vision_score: str = "rollout",
    language_score: str = "rollout",
    words: str = "te_rt",
    seed: int = 0,
) -> Plan:
    """Instruction-guided Visual Token Pruning (10.1007/978-3-031-72643-9_13): rollout in the ViT, then in the language model.

    Scores     attention rollout of each group of layers, in the ViT from CLS, in the language model from the pseudo CLS
    Selects    the highest, in sequence order
    The rest   is dropped
    Where      before the FFN at the end of every group, in the ViT and in the first `part1` language layers (by default
               3/8 of them, at most 12)

    The paper does not say how the budget is split; by default all cuts of both sites keep the same share (576 → 480 399
    333 277 231 192 160 133, then 111 92 77 64), or `vision_keep` tokens leave the ViT, or the ViT does the part `split` of
    the reduction: tokens · (keep / tokens) ^ split leave it (0: it prunes nothing, 1: everything). `words` is
    Table 6: which words make the pseudo CLS (see `ivtp.core.guidance.WORDS`); "none" of them is
    reference="visual_cls", what Eq. 8 falls back to. `vision_score` and `language_score` may be "layerwise" (Table 4) or
    "random" (with `seed`), the control without which guidance proves nothing; language_score="target_first" is the oracle,
    which reads the target patches.
    """
    if shape.language is None:
        raise ValueError("ivtp prunes inside a language model, but this model has none; use ivtp_v")
    in_vision, in_language, part1 = both_ends(shape, "ivtp", group, language_group, part1)
    if split is not None:
        if vision_keep is not None:
            raise ValueError(f"split={split} and vision_keep={vision_keep} say the same thing; give one of them")
        if not 0 <= split <= 1:
            raise ValueError(f"split={split} must be between 0 (all in the language model) and 1 (all in the ViT)")
        vision_keep = round(shape.patches * (keep / shape.patches) ** split)
    if vision_keep is not None:
        check_vision_keep(shape, keep, vision_keep)
    vision, language = at_both_sites(shape, keep, in_vision, in_language, vision_keep=vision_keep)
    scores = {
        "rollout": Rollout(combine, value_norm),
        "layerwise": Layerwise(value_norm),
        "random": Random(seed),
        "target_first": TargetFirst(seed),
    }
    if language_score == "asked":
        warnings.warn('language_score="asked" is called "target_first" now', DeprecationWarning, stacklevel=2)
        language_score = "target_first"
    check_choice("vision_score", vision_score, ("rollout", "layerwise", "random"))
    check_choice("language_score", language_score, scores)
    return Plan(
        vision=Stage(vision, scores[vision_score]),
        language=Stage(language, scores[language_score]),
        # Random and TargetFirst read no attention, so no reference token is appended for them.
        reference=reference if language_score in ("rollout", "layerwise") else "last",
        part1=part1,
        tau=tau,
        words=words,
    )
