"""Guidance of a prefill: the relevance of visual tokens, and the reference token that scores them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ivtp.backbones.family import PruneOptions
from ivtp.backbones.text.token_relevance import Guide
from ivtp.backbones.vlm.adapter import VLMAdapter
from ivtp.backbones.vlm.prompts import ImageSlots, Prompts
from ivtp.core.guidance import pseudo_cls, raters
from ivtp.core.plan import Plan
from ivtp.core.tokens import Tokens


@dataclass(frozen=True)
class Guidance:
    """Relevance and reference tokens for a plan's language stage; `guide`: None where no instruction is read."""

    adapter: VLMAdapter
    embed: Any
    guide: Guide | None
    options: PruneOptions

    def rated(self, plan: Plan, tokens: Tokens, prompts: Prompts, slots: ImageSlots) -> Tokens:
        """Add the relevance, or mark the reference tokens, that the plan asks for."""
        if plan.reads_target:
            tokens = replace(tokens, relevance=self._target_patches(tokens, prompts, slots))
        if plan.reads_relevance and self.guide is not None:
            with self.options.part("text_encoder"):
                of = (prompts.numbers, prompts.total)
                fit = self.guide.fit(prompts.input_ids, prompts.valid, slots.joint(), of).to(tokens.size.dtype)
            tokens = replace(tokens, relevance=torch.zeros_like(tokens.size).scatter(1, tokens.visual_index, fit))
        if plan.reference == "raters":
            with self.options.part("pruner"):
                tokens = replace(tokens, reference=raters(tokens), facts=replace(tokens.facts, lone=False))
        return tokens

    def reference(self, plan: Plan, prompts: Prompts, slots: ImageSlots) -> tuple[Tensor, list | None]:
        """The token appended for part 1 (Eq. 8), pseudo CLS or projected visual CLS "b d"; and the words of the former."""
        with self.options.part("text_encoder"):
            visual_cls = self.adapter.project(slots.global_feature[:, None])[:, 0]
            if plan.reference == "visual_cls" or self.guide is None:
                return visual_cls, None
            x, of = self.embed(prompts.input_ids), (prompts.numbers, prompts.total)
            if plan.reads_clip:
                relevance, words = self.guide(prompts.input_ids, prompts.valid, slots.joint_feature(), of)
            else:
                fit = torch.cosine_similarity(x.float(), visual_cls[:, None].float(), dim=-1)
                relevance, words = self.guide.spelled_out(prompts.input_ids, prompts.valid, fit, of)
            return pseudo_cls(x, relevance, plan.tau, visual_cls, plan.words), words

    def _target_patches(self, tokens: Tokens, prompts: Prompts, slots: ImageSlots) -> Tensor:
        """1 where a visual token that is left lies on the target patches "b n"."""
        patches, count, total = self.options.target_patches, len(slots.feature_slots), prompts.total
        if patches is None or total % len(patches) or patches.shape[1] != count:
            given = None if patches is None else tuple(patches.shape)
            raise ValueError(
                f"this plan keeps what each question is about and must be told by target_patches=, one row of {count} "
                f"true or false per prompt ({total}), but target_patches is {given}"
            )
        patches = patches.to(tokens.x.device).repeat_interleave(total // len(patches), 0)[list(prompts.numbers)]
        patches = patches.to(tokens.size.dtype).gather(1, slots.rank)
        return torch.zeros_like(tokens.size).scatter(1, tokens.visual_index, patches)
