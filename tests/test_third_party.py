"""The template of a pruner in a package of its own: built, installed into a new environment, and run from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from helpers.running import ROOT, environment, lines, one_line

TEMPLATE = ROOT / "tests" / "template_pruner"


def run(*command, cwd, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment(**more), capture_output=True, text=True,
        stdin=subprocess.DEVNULL, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the template's wheel, and with what is installed here visible in it."""
    folder = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(TEMPLATE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "dist"))
    built = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check", "--outdir", folder, source,
        cwd=folder,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")

    home = folder / "venv"
    venv.create(home, with_pip=False)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    # --system-site-packages would show the base interpreter's packages, not those of the environment we are in.
    found = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    site = found.stdout.strip()
    here = dict.fromkeys([str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    with open(os.path.join(site, "here.pth"), "w") as file:
        file.write("\n".join(here) + "\n")
    installed = run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    assert installed.returncode == 0, installed.stderr
    return python


def test_it_is_short():
    code = [line for line in (TEMPLATE / "ivtp_unusual.py").read_text().splitlines() if line.strip()]
    assert len(code) < 30


def test_its_row_is_in_the_table(python, tmp_path):
    arguments = ["pruner=unusual", "pruner.layer=4", "budget.keep=9", "debug=limit", "data.limit=5", "logger=none"]
    done = run(python, "-m", "ivtp.run", *arguments, f"output={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = lines(tmp_path / "run" / "results.jsonl")[-1]
    assert (row["label"], row["tokens"][-1], row["cuts"]["vision"]) == ("unusual", 9, [[4, 9, "attn"]])
    assert row["pruner"] == {"name": "unusual", "layer": 4, "keep": 9}
    assert "| unusual |" in (tmp_path / "run" / "table.md").read_text()


def test_it_is_listed_with_its_docstring_and_its_defaults_hold(python, tmp_path):
    helped = run(python, "-m", "ivtp.run", "--help", cwd=tmp_path)
    assert "Unusual keys stay: one cut" in helped.stdout
    code = "from ivtp.experiment import config; import ivtp_unusual as u; print(config.pruner_defaults('unusual'), u.__file__)"
    shown = run(python, "-c", code, cwd=tmp_path).stdout
    assert "{'name': 'unusual', 'layer': 6}" in shown and str(python.parent.parent) in shown


def test_what_it_cannot_do_is_refused_before_the_first_image(python, tmp_path):
    done = run(
        python, "-m", "ivtp.run", "pruner=unusual", "pruner.layer=99", "debug=limit", "logger=none", cwd=tmp_path
    )
    assert done.returncode == 2 and "layer" in one_line(done.stderr)


def test_here_nobody_knows_it():
    from ivtp import list_pruners

    assert "unusual" not in list_pruners()
