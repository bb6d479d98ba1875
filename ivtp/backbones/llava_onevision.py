"""LLaVA-OneVision: SigLIP instead of CLIP; one image in crops, several images whole; very large ones are blended."""

from __future__ import annotations

import torch
from torch import Tensor

from ivtp.backbones.llava import LlavaFront, pruned_by
from ivtp.backbones.llava_next import Crops, shape

__all__ = ["prune", "shape"]


class BlendedCrops(Crops):
    """As LLaVA-NeXT's, but images of a prompt with several are not cut, and what makes too many tokens is interpolated."""

    def _in_crops(self, number: int, inputs: dict) -> bool:
        counts = inputs.get("batch_num_images")
        return counts is None or [n == 1 for n in counts.tolist() for _ in range(n)][number]

    def _pack(self, features: Tensor, size: tuple[int, int], newline: Tensor | None) -> Tensor:
        ratio = self.config.vision_aspect_ratio
        return self.core.pack_image_features(
            [features], torch.tensor([size]), image_newline=newline, vision_aspect_ratio=ratio
        )[0][0]


prune = pruned_by(lambda model: LlavaFront(model, BlendedCrops(model)))
