"""Memory of a text encoder's features, for the batches and rows of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ivtp.backbones.vlm.vision_cache import tensor_bytes
from ivtp.core.guidance import Spelled

GROUP = 64
"""Texts that are encoded at once."""
LIMIT = 256 << 20
"""Bytes of features that are kept."""


class TextMemory:
    """A text encoder (see `TextEncoder`) that encodes each distinct text once.

    Texts are encoded in groups that the order of all texts fixes. So features are the same, to the bit, in every batch, row,
    process and restart: matrix products differ in their last bits with the number of their rows.

    texts  of the run, in the order in which they are needed; any other text is a group of its own
    limit  bytes of features; beyond it the oldest group is forgotten, and encoded again where it is needed
    """

    def __init__(self, encoder: Any, texts: Iterable[str] = (), limit: int = LIMIT) -> None:
        self.encoder, self.limit, self.bytes = encoder, limit, 0
        distinct = list(dict.fromkeys(texts))
        groups = [tuple(distinct[start : start + GROUP]) for start in range(0, len(distinct), GROUP)]
        self._group = {text: group for group in groups for text in group}
        self._features: dict[tuple, tuple[dict[str, Any], int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)  # its sizes, `lengths`, `project`

    def encode(self, texts: Sequence[str]) -> list[Spelled]:
        """Features of every token of each text; see `TextEncoder`."""
        return [self._of("encode", text) for text in texts]

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Feature of each text as a whole; see `TextEncoder`."""
        return [self._of("embed", text) for text in texts]

    def _of(self, method: str, text: str) -> Any:
        group = self._group.get(text, (text,))
        key = (method, group)
        if key not in self._features:
            features = dict(zip(group, getattr(self.encoder, method)(group), strict=True))
            size = sum(map(tensor_bytes, features.values()))
            while self._features and self.bytes + size > self.limit:
                self.bytes -= self._features.pop(next(iter(self._features)))[1]
            self._features[key] = features, size
            self.bytes += size
        return self._features[key][0][text]
