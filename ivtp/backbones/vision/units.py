"""Attention of towers whose patches are cut in units (a patch merger's, pixel shuffle's) or attend in windows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ivtp.core.attention import Attention


@dataclass(frozen=True)
class UnitAttention(Attention):
    """An attention record over units: behind `prefix` single tokens, `unit` patches of q, k, v are one visual token.

    A unit's row is the mean of its patches' rows and its column their sum, so that rows still sum to one. Its key and ‖V‖
    are the means over its patches.

    places  for the prefix and for every patch, unit by unit, its place in q, k, v "b m"; None: they stand in this order
    """

    unit: int = 1
    prefix: int = 0
    places: Tensor | None = None

    def rows(self, index: Tensor) -> Tensor:
        if bool((index < self.prefix).all()):
            return self._fold(super().rows(index))
        first = torch.where(index < self.prefix, index, self.prefix + (index - self.prefix) * self.unit)
        step = torch.arange(self.unit, device=index.device) * (index >= self.prefix)[:, :, None]
        patches = (first[:, :, None] + step).flatten(1)
        rows = super().rows(patches if self.places is None else self.places.gather(1, patches))
        return self._fold(rows.unflatten(1, (-1, self.unit)).mean(2))

    def propagate(self, w: Tensor) -> Tensor:
        spread = (w[:, self.prefix :] / self.unit).repeat_interleave(self.unit, 1)
        spread = torch.cat([w[:, : self.prefix], spread], 1)
        if self.places is not None:
            spread = torch.zeros_like(spread).scatter(1, self.places, spread)
        return self._fold(super().propagate(spread))

    def map(self) -> Tensor:
        n = self.prefix + (self.q.shape[2] - self.prefix) // self.unit
        return self.rows(torch.arange(n, device=self.q.device).expand(self.q.shape[0], n))

    def value_norm(self) -> Tensor:
        return self._fold(super().value_norm(), mean=True)

    def keys(self) -> Tensor:
        return self._fold(super().keys().transpose(1, 2), mean=True).transpose(1, 2)

    def _fold(self, values: Tensor, mean: bool = False) -> Tensor:
        """Fold the last axis from patches to tokens."""
        if self.places is not None:
            values = values.gather(-1, self.places.view(len(values), *[1] * (values.ndim - 2), -1).expand_as(values))
        units = values[..., self.prefix :].unflatten(-1, (-1, self.unit))
        return torch.cat([values[..., : self.prefix], units.mean(-1) if mean else units.sum(-1)], -1)


@dataclass(frozen=True)
class WindowAttention(UnitAttention):
    """Attention record of a layer in which tokens attend inside their window only; q, k, v "1 h p e" are packed, window after
    window, as a variable-length kernel takes them.

    inside  for every token "b n" its place in the packing, in units; -1: padding
    window  number of the window (over the whole batch) of each packed unit "u"
    """

    inside: Tensor = field(kw_only=True)
    window: Tensor = field(kw_only=True)

    @cached_property
    def _windows(self) -> tuple[UnitAttention, Tensor]:
        """The windows as a padded batch, and for each packed unit its place in that batch."""
        counts = torch.bincount(self.window)
        starts = counts.cumsum(0) - counts
        windows, most = len(counts), int(counts.max())
        place = torch.arange(len(self.window), device=self.window.device) - starts[self.window]
        flat = self.window * most + place

        def padded(t: Tensor) -> Tensor:
            h, _, e = t.shape[1:]
            out = t.new_zeros(windows * most, h, self.unit, e)
            out[flat] = t[0].view(h, -1, self.unit, e).transpose(0, 1)
            return out.view(windows, most, h, self.unit, e).transpose(1, 2).flatten(2, 3)

        bias = torch.full((windows * most, self.unit), float("-inf"), device=flat.device)
        bias[flat] = 0.0 if self.bias is None else self.bias.view(-1, self.unit).float()
        q, k, v, bias = padded(self.q), padded(self.k), padded(self.v), bias.view(windows, -1)
        return UnitAttention(q, k, v, self.scale, bias, unit=self.unit), flat

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
        """Rows of the map, one after another; `propagate` is faster for many rows."""
        n = self.inside.shape[1]
        rows = [self.propagate(torch.nn.functional.one_hot(column, n).float()) for column in index.unbind(1)]
        return torch.stack(rows, 1)

    def map(self) -> Tensor:
        return self.rows(torch.arange(self.inside.shape[1], device=self.inside.device).expand_as(self.inside))

    def value_norm(self) -> Tensor:
        return self._unpack(super().value_norm()[0])

    def keys(self) -> Tensor:
        return self._unpack(super().keys()[0])

    def _unpack(self, packed: Tensor) -> Tensor:
        """Reorder packed values "u ..." to the tokens "b n ...", zero on padding."""
        values = packed[self.inside.clamp_min(0)]
        real = (self.inside >= 0).view(*self.inside.shape, *[1] * (packed.ndim - 1))
        return torch.where(real, values, 0.0)
