"""Records name the processor and what computes on it."""

from __future__ import annotations

from types import SimpleNamespace

from conftest import llava

from ivtp.evaluation.hardware import attention_kernel, blas, cpu, hardware


def test_the_processor_is_named():
    found = hardware("cpu", "sdpa")
    assert found["name"] == cpu() and found["name"]
    assert found["cores"] >= 1 <= found["threads"]
    assert found["kernel"] == "sdpa" and found["instructions"]
    assert blas().partition(" ")[0] not in ("", "unknown")


def test_the_kernel_is_that_of_the_model():
    assert attention_kernel(llava("eager")) == "eager"
    assert attention_kernel(SimpleNamespace()) is None
