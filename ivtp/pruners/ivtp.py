"""IVTP (ECCV 2024), both stages."""

from __future__ import annotations

from ivtp.pruners import register_pruner
from ivtp.pruners.sites import part1_layers, vision_layers
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.schedules import Cut, equal_ratio, group_ends
from ivtp.pruning.scores import Asked, Chance, Layerwise, Rollout


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
    """Instruction-guided Visual Token Pruning (10.1007/978-3-031-72643-9_13): rollout per group in the ViT, then in
    the first `part1` LLM layers with the pseudo CLS as reference.

    The paper does not say how the budget is split; by default all cuts of both sites keep the same share (576 → 480 399
    333 277 231 192 160 133, then 111 92 77 64), or `vision_keep` tokens leave the ViT, or the ViT does the part `split` of
    the reduction: tokens · (keep / tokens) ^ split leave it (0: it prunes nothing, 1: everything). `words` is
    Table 6: which words make the pseudo CLS (see `ivtp.pruning.instruction.WORDS`); "none" of them is
    reference="visual_cls", what Eq. 8 falls back to. `vision_score` and `language_score` may be "layerwise" (Table 4) or "random"
    (with `seed`), the control without which guidance proves nothing; language_score="asked" is an oracle that is told what the
    question is about.
    """
    part1 = part1_layers(shape) if part1 is None else part1
    if shape.language is None:
        raise ValueError("ivtp prunes inside a language model, but this model has none; use ivtp_v")
    if not 1 <= part1 <= shape.language.depth:
        raise ValueError(f"part1={part1} must be between 1 and the {shape.language.depth} layers of the language model")
    in_vision = group_ends(vision_layers(shape), group)
    in_language = group_ends(part1, language_group)
    counts = equal_ratio(shape.patches, keep, len(in_vision) + len(in_language))
    if split is not None:
        if vision_keep is not None:
            raise ValueError(f"split={split} and vision_keep={vision_keep} say the same thing; give one of them")
        if not 0 <= split <= 1:
            raise ValueError(f"split={split} must be between 0 (all in the language model) and 1 (all in the ViT)")
        vision_keep = round(shape.patches * (keep / shape.patches) ** split)
    if vision_keep is not None:
        if not keep <= vision_keep <= shape.patches:
            raise ValueError(f"vision_keep={vision_keep} must be between keep={keep} and {shape.patches}")
        counts = equal_ratio(shape.patches, vision_keep, len(in_vision))
        counts += equal_ratio(vision_keep, keep, len(in_language))
    scores = {
        "rollout": Rollout(combine, value_norm),
        "layerwise": Layerwise(value_norm),
        "random": Chance(seed),
        "asked": Asked(seed),
    }
    for site, score, known in (
        ("vision_score", vision_score, ("rollout", "layerwise", "random")),
        ("language_score", language_score, tuple(scores)),
    ):
        if score not in known:
            raise ValueError(f"{site}={score!r} is not one of {', '.join(known)}")
    cuts = [Cut(layer, count) for layer, count in zip(in_vision + in_language, counts, strict=True)]
    return Plan(
        vision=Pruner(tuple(cuts[: len(in_vision)]), scores[vision_score]),
        language=Pruner(tuple(cuts[len(in_vision) :]), scores[language_score]),
        # Chance and the oracle ask no reference, so none is appended for them.
        reference=reference if language_score in ("rollout", "layerwise") else "last",
        part1=part1,
        tau=tau,
        words=words,
    )
