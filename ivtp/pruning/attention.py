"""The attention of one layer as a record that answers questions without forming the n × n map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 64
"""Query rows formed at a time; memory beside q, k, v is b · h · BLOCK · m."""


@dataclass(frozen=True)
class Attention:
    """q, k, v of one layer as its kernel saw them (after RoPE, norms and biases), for `A = softmax(q kᵀ · scale + bias)`.

    bias    added to the logits of every query, per key: -inf hides padding, log size weighs merged tokens; None: nothing
    causal  True: a query sees the keys up to its own place
    All answers are float32 and averaged over heads (the paper's fusion of heads is unknown; the mean is our default).
    """

    q: Float[Tensor, "b h n e"]
    k: Float[Tensor, "b g m e"]
    v: Float[Tensor, "b g m e"]
    scale: float
    bias: Float[Tensor, "b m"] | None = None
    causal: bool = False

    def rows(self, index: Int[Tensor, "b a"]) -> Float[Tensor, "b a m"]:
        """The attention of the queries at `index`, mean over heads."""
        b, h, _, e = self.q.shape
        q = self.q.gather(2, index[:, None, :, None].expand(b, h, index.shape[1], e))
        return self._probabilities(q, index).mean(1)

    def propagate(self, w: Float[Tensor, "b n"]) -> Float[Tensor, "b m"]:
        """`w @ A`: what the weighted queries look at together, streamed in blocks of rows."""
        total = torch.zeros(w.shape[0], self.k.shape[2], device=w.device)
        n = self.q.shape[2]
        for start in range(0, n, BLOCK):
            index = torch.arange(start, min(start + BLOCK, n), device=w.device).expand(w.shape[0], -1)
            part = self._probabilities(self.q[:, :, start : start + BLOCK], index).mean(1)
            total = total + (w[:, None, start : start + BLOCK].float() @ part)[:, 0]
        return total

    def map(self) -> Float[Tensor, "b n m"]:
        """The whole map, mean over heads. Quadratic memory: for methods that cannot do without."""
        b, _, n, _ = self.q.shape
        return self.rows(torch.arange(n, device=self.q.device).expand(b, n))

    def value_norm(self) -> Float[Tensor, "b m"]:
        """‖V_i‖ of the value vectors with all heads concatenated (arXiv 2111.15667, as its published code does)."""
        groups = self.q.shape[1] // self.v.shape[1]
        return (self.v.float().square().sum(dim=(1, 3)) * groups).sqrt()

    def keys(self) -> Float[Tensor, "b m e"]:
        """Keys, mean over heads: the metric of ToMe (arXiv 2210.09461)."""
        return self.k.float().mean(1)

    def _probabilities(self, q: Tensor, place: Tensor) -> Float[Tensor, "b h a m"]:
        b, h, a, e = q.shape
        g, m = self.k.shape[1:3]
        # Heads that share keys are folded into rows, so the keys are never repeated.
        logits = q.reshape(b, g, h // g * a, e).float() @ self.k.float().transpose(2, 3)
        logits = logits.view(b, h, a, m) * self.scale
        if self.bias is not None:
            logits = logits + self.bias[:, None, None].float()
        if self.causal:
            later = torch.arange(m, device=q.device) > place[:, None, :, None]
            logits = logits.masked_fill(later, float("-inf"))
        # A padding query of a left-padded prompt sees nothing; its row is never used, but must not be NaN.
        return logits.softmax(-1).nan_to_num(0.0)
