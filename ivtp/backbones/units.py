"""Attention of towers whose patches are cut in units (a patch merger's, pixel shuffle's) or attend in windows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ivtp.pruning.attention import Attention


@dataclass(frozen=True)
class UnitAttention(Attention):
    """The same record asked about units: behind `prefix` single tokens, `unit` patches of q, k, v are one visual token.

    A unit looks as its patches do on average and is looked at by all that its patches get, so that rows still sum to
    one; its key and ‖V‖ are the means of theirs.
    """

    unit: int = 1
    prefix: int = 0

    def rows(self, index: Tensor) -> Tensor:
        if bool((index < self.prefix).all()):
            return self._fold(super().rows(index))
        b, a = index.shape
        first = torch.where(index < self.prefix, index, self.prefix + (index - self.prefix) * self.unit)
        step = torch.arange(self.unit, device=index.device)
        patches = first[:, :, None] + step * (index >= self.prefix)[:, :, None]
        rows = super().rows(patches.flatten(1)).view(b, a, self.unit, -1).mean(2)
        return self._fold(rows)

    def propagate(self, w: Tensor) -> Tensor:
        spread = (w[:, self.prefix :] / self.unit).repeat_interleave(self.unit, 1)
        return self._fold(super().propagate(torch.cat([w[:, : self.prefix], spread], 1)))

    def map(self) -> Tensor:
        n = self.prefix + (self.q.shape[2] - self.prefix) // self.unit
        return self.rows(torch.arange(n, device=self.q.device).expand(self.q.shape[0], n))

    def value_norm(self) -> Tensor:
        return self._fold(super().value_norm(), mean=True)

    def keys(self) -> Tensor:
        return self._fold(super().keys().transpose(1, 2), mean=True).transpose(1, 2)

    def _fold(self, values: Tensor, mean: bool = False) -> Tensor:
        """The last axis from patches to tokens."""
        units = values[..., self.prefix :].unflatten(-1, (-1, self.unit))
        return torch.cat([values[..., : self.prefix], units.mean(-1) if mean else units.sum(-1)], -1)


@dataclass(frozen=True)
class WindowAttention(UnitAttention):
    """The record of a layer in which tokens attend inside their window only; q, k, v "1 h p e" are packed, window after
    window, as a variable-length kernel takes them.

    inside  for every token "b n" its place in the packing, in units; -1: padding
    window  number of the window (over the whole batch) of each packed unit "u"
    """

    inside: Tensor | None = None
    window: Tensor | None = None

    @cached_property
    def _windows(self) -> tuple[UnitAttention, Tensor]:
        """The windows as a padded batch, and for each packed unit its place in that batch."""
        counts = torch.bincount(self.window)
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(self.window), device=self.window.device) - starts[self.window]
        shape = (len(counts), int(counts.max()))
        flat = self.window * shape[1] + place

        def padded(t: Tensor) -> Tensor:
            h, _, e = t.shape[1:]
            units = t[0].view(h, -1, self.unit, e).permute(1, 0, 2, 3)
            out = t.new_zeros(shape[0] * shape[1], h, self.unit, e)
            out[flat] = units
            return out.view(*shape, h, self.unit, e).permute(0, 2, 1, 3, 4).flatten(2, 3)

        bias = torch.full((shape[0] * shape[1], self.unit), float("-inf"), device=flat.device)
        bias[flat] = 0.0 if self.bias is None else self.bias.view(-1, self.unit).float()
        record = UnitAttention(
            padded(self.q), padded(self.k), padded(self.v), self.scale, bias.view(shape[0], -1), unit=self.unit
        )
        return record, flat

    def propagate(self, w: Tensor) -> Tensor:
        record, flat = self._windows
        n = record.q.shape[2] // self.unit
        packed = torch.zeros(len(flat), device=w.device)
        real = self.inside >= 0
        packed[self.inside[real]] = w[real].float()
        spread = torch.zeros(record.q.shape[0] * n, device=w.device)
        spread[flat] = packed
        return self._unpack(record.propagate(spread.view(-1, n)).flatten()[flat])

    def rows(self, index: Tensor) -> Tensor:
        """One row after another: whoever wants many of them wants `propagate`."""
        n = self.inside.shape[1]
        rows = [self.propagate(torch.nn.functional.one_hot(column, n).float()) for column in index.unbind(1)]
        return torch.stack(rows, 1)

    def map(self) -> Tensor:
        b, n = self.inside.shape
        return self.rows(torch.arange(n, device=self.inside.device).expand(b, n))

    def value_norm(self) -> Tensor:
        return self._unpack(super().value_norm()[0])

    def keys(self) -> Tensor:
        return self._unpack(super().keys()[0])

    def _unpack(self, packed: Tensor) -> Tensor:
        """From the packing "u ..." to the tokens "b n ...", zero where there is padding."""
        values = packed[self.inside.clamp_min(0)]
        real = (self.inside >= 0).view(*self.inside.shape, *[1] * (packed.ndim - 1))
        return torch.where(real, values, 0.0)
