"""Checks of golden cases, one function per (method, kind)."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor

CHECKS: dict[tuple[str, str], Callable] = {}


def check(method: str, *kinds: str):
    """Decorator: this function checks the cases of `method` with one of these kinds ("": a case without kind)."""

    def add(function):
        CHECKS.update({(method, kind): function for kind in kinds or ("",)})
        return function

    return add


class Case:
    """One golden case: tensors by field, parameters, and a note of which fields were looked at."""

    def __init__(self, tensors: dict[str, Tensor], params: dict) -> None:
        self.tensors, self.params = tensors, params
        self.used: set[str] = set()

    def __getitem__(self, field: str) -> Tensor:
        self.used.add(field)
        return self.tensors[field]

    def __contains__(self, field: str) -> bool:
        return field in self.tensors

    def get(self, field: str) -> Tensor | None:
        return self[field] if field in self.tensors else None

    def state_dict(self, prefix: str = "sd.") -> dict[str, Tensor]:
        return {key[len(prefix) :]: self[key] for key in self.tensors if key.startswith(prefix)}

    def excuse(self, pattern: str, reason: str) -> None:
        """These fields are out of the package's scope; the reason is for the reader."""
        assert reason
        self.used.update(key for key in self.tensors if fnmatchcase(key, pattern))

    def unused(self) -> list[str]:
        return sorted(set(self.tensors) - self.used)

    def equal(self, field: str, actual: Tensor, part=...) -> None:
        """Indices and masks: exactly equal."""
        __tracebackhide__ = True
        expected = self[field][part]
        assert actual.shape == expected.shape, f"{field}: {tuple(actual.shape)} against {tuple(expected.shape)}"
        assert torch.equal(actual.to(expected.dtype), expected), f"{field} differs:\n{actual}\nagainst\n{expected}"

    def close(self, field: str, actual: Tensor, part=...) -> None:
        """Floats: equal within 1e-4."""
        __tracebackhide__ = True
        expected = self[field][part]
        assert actual.shape == expected.shape, f"{field}: {tuple(actual.shape)} against {tuple(expected.shape)}"
        torch.testing.assert_close(
            actual.to(expected.dtype), expected, atol=1e-4, rtol=1e-4, msg=lambda m: f"{field}: {m}"
        )


# Each module adds its checks when it is imported.
from helpers.golden_checks import core, language, vision  # noqa: E402, F401
