"""Runs of the command for the tests: in this process, in one of its own, and one finished run that many tests read."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
QUICK = ("debug=limit", "logger=none")
COPIED = ("_build", "experiments", "jupyter_execute", "notebooks")
"""Folders of docs/ that its build writes."""
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if not (path.is_relative_to(ROOT / "docs") and path.relative_to(ROOT / "docs").parts[0] in COPIED)
}
"""README and the pages of the documentation, by path."""
README = PAGES["README.md"]
FIRST_RUN = re.findall(r"^## First run on .*?^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0].splitlines()
"""The README's first run on a real model, which needs a hub: `test_hub.py` has one."""


@cache
def code_version() -> str:
    from ivtp import results as records

    return records.code_version()


def run(*arguments: str, output: Path | None = None, quick: bool = True) -> int:
    """`python -m ivtp.run` in this process, on a few samples; one code version, also if somebody edits meanwhile."""
    from ivtp.run import main

    with patch("ivtp.results.code_version", return_value=code_version()):
        return main([*arguments, *(QUICK if quick else ()), *([f"output={output}"] if output else [])])


def command(*arguments: str, module: str = "ivtp.run") -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """One thread, and neither a login of W&B nor its settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def spawn(*arguments: str, module: str = "ivtp.run", **more) -> subprocess.CompletedProcess:
    """The command in a process of its own, from outside the checkout."""
    given = {"cwd": tempfile.gettempdir(), "env": environment(), "timeout": 300, **more}
    return subprocess.run(
        command(*arguments, module=module),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        **given,
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcomes(folder: Path, record: dict) -> list[dict]:
    """The samples' outcomes of one row, in the order of their ids."""
    return sorted(lines(folder / "outcomes" / f"{record['key']}.jsonl"), key=lambda outcome: outcome["id"])


def by_label(folder: Path) -> dict[str, dict]:
    return {record["label"]: record for record in lines(folder / "results.jsonl")}


@cache
def finished() -> Path:
    """The folder of the main job on a few samples, made once; tests that write take a copy."""
    output = Path(tempfile.mkdtemp(prefix="ivtp-finished-"))
    atexit.register(shutil.rmtree, output, ignore_errors=True)
    assert run("experiment=ablation_groupsize", output=output) == 0
    return output / "ablation_groupsize"


def one_line(error: str) -> str:
    """The only line of standard error: that of a request that cannot be met."""
    assert "Traceback" not in error, error
    found = error.strip().splitlines()
    assert len(found) == 1, error
    assert found[0].startswith("ivtp: "), error
    return found[0].removeprefix("ivtp: ")
