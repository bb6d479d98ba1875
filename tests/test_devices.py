"""Devices without having them: every tensor that a method makes is made where the model is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("pruners/test_every_pruner.py", "unmodified_llava and sdpa-keep"),
        ("backbones/test_families.py", "is_the_masked_model and fastv and not qwen"),
    ],
)
def test_no_tensor_is_left_on_another_device(file, chosen):
    """On a GPU such a tensor ends a run at its first sample. Here a CPU says that it is one (`helpers.pretend`)."""
    env = os.environ | {"IVTP_TEST_DEVICE": "pretend", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", str(TESTS / file), "-k", chosen, "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
