"""The same tokens as the methods' published code.

Every `<method>/cases*.safetensors` below the folder named by IVTP_GOLDEN (default: tests/golden) is read; a case goes
to the check of its method and `kind`. A check must use or compare every tensor of its case, or name why not: a method,
kind or field that nobody knows fails. Indices compare exactly, floats within 1e-4.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))

from helpers.golden_checks import CHECKS, Case

FOLDER = Path(os.environ.get("IVTP_GOLDEN") or Path(__file__).parent / "golden")


def cases():
    for path in sorted(FOLDER.glob("*/cases*.safetensors")):
        with safe_open(path, "pt") as file:
            names = json.loads(file.metadata()["params"])
        for name in names:
            yield pytest.param(path, name, id=f"{path.parent.name}-{path.stem}-{name}")


@pytest.mark.parametrize(("path", "name"), list(cases()))
def test_same_as_published_code(path, name):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        params = json.loads(metadata["params"])[name]
        tensors = {key[len(name) + 1 :]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}.")}  # noqa: SIM118
    method, kind = metadata.get("method", path.parent.name), params.get("kind", "")
    assert (method, kind) in CHECKS, (
        f"no check for method {method!r}, kind {kind!r}; add one to tests/helpers/golden_checks"
    )
    case = Case(tensors, params)
    CHECKS[method, kind](case)
    assert not case.unused(), f"fields that nothing compared, used or excused: {case.unused()}"


def test_there_are_golden_files():
    found = [path.parent.name for path in FOLDER.glob("*/cases*.safetensors")]
    assert found, f"no <method>/cases*.safetensors below {FOLDER}"
