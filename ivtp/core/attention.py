"""The attention of one layer as a record: rows of its map and products with it, without forming the n × n map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ivtp.core.kernels import TRITON, column_sums, streamed_sums


@dataclass(frozen=True)
class Attention:
    """q, k, v of one layer as its kernel saw them (after RoPE, norms and biases), for `A = softmax(q kᵀ · scale + bias)`.

    bias    added to the logits of every query, per key: -inf hides padding, log size weighs merged tokens; None: nothing
    causal  True: a query sees the keys up to its own place
    All results are float32 and averaged over heads (the paper's fusion of heads is unknown; the mean is our default).
    Memory beside q, k, v grows with n, not n²; only `map`, and what is not linear in the map (a maximum over heads or
    layers' whole maps), needs n².
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
        g, a = self.k.shape[1], index.shape[1]
        q = self.q.gather(2, index[:, None, :, None].expand(b, h, a, e))
        # Heads that share keys are folded into rows, so the keys are never repeated.
        logits = (q.reshape(b, g, h // g * a, e).float() * self.scale) @ self.k.float().transpose(2, 3)
        logits = logits.view(b, h, a, -1)
        if self.bias is not None:
            logits = logits + self._low(self.bias)[:, None, None]
        if self.causal:
            later = torch.arange(logits.shape[3], device=index.device) > index[:, None, :, None]
            logits = logits.masked_fill(later, float("-inf"))
        return self._hide(logits.softmax(-1).mean(1))

    def propagate(self, w: Float[Tensor, "b n"]) -> Float[Tensor, "b m"]:
        """`w @ A`: the weighted sum of the rows; `w` is never negative. w = 1/n gives column means.

        On a GPU two kernels of Triton, where it is there, else a stream over blocks of rows (`ivtp.core.kernels`).
        """
        bias = None if self.bias is None else self._low(self.bias)
        fused = TRITON and self.q.is_cuda and self.q.dtype != torch.float64
        sums = column_sums if fused else streamed_sums
        with torch.no_grad():
            total = sums(self.q, self.k, w, bias, self.scale, self.causal)
        return self._hide(total[:, None])[:, 0] / self.q.shape[1]

    def map(self) -> Float[Tensor, "b n m"]:
        """The whole map, mean over heads. Quadratic memory: for methods that cannot do without."""
        b, _, n, _ = self.q.shape
        return self.rows(torch.arange(n, device=self.q.device).expand(b, n))

    def value_norm(self) -> Float[Tensor, "b m"]:
        """‖V_i‖ of the value vectors with all heads concatenated (arXiv 2111.15667, as its published code does)."""
        groups = self.q.shape[1] // self.v.shape[1]
        norm = torch.linalg.vector_norm(self.v, dim=(1, 3), dtype=torch.float32)
        return norm if groups == 1 else norm * groups**0.5

    def keys(self) -> Float[Tensor, "b m e"]:
        """Keys, mean over heads: the metric of ToMe (arXiv 2210.09461)."""
        return self.k.float().mean(1)

    @staticmethod
    def _low(bias: Tensor) -> Tensor:
        """-inf as a finite number that still vanishes in a softmax: a padding query with no key must not give NaN."""
        return bias.float().clamp_min(-1e3)

    def _hide(self, rows: Float[Tensor, "b a m"]) -> Float[Tensor, "b a m"]:
        """Zero the attention on padding keys."""
        return rows if self.bias is None else rows.masked_fill(self.bias[:, None] == float("-inf"), 0.0)
