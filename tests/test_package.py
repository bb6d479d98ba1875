"""The wheel runs the main job from any folder, and finds pruners of other wheels; the project's files say the truth."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version

import pytest
import yaml
from helpers.running import ROOT, environment, lines

import ivtp


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as `python -m build` builds it, with the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The wheel installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel],
        capture_output=True, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return folder


def python(site, *arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(PYTHONPATH=str(site)),
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_the_wheel_holds_configs_model_licence_and_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "ivtp", "configs"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    for path in tracked.stdout.split():
        inside = f"ivtp/{path}" if path.startswith("configs/") else path
        if (ROOT / path).exists():
            assert inside in names, path
    for path in ("model.safetensors", "config.json", "tokenizer.json", "clip/model.safetensors", "README.md"):
        assert f"ivtp/assets/tiny/{path}" in names
    assert "ivtp/configs/experiment/ablation_groupsize.yaml" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "notebooks", "experiments", "configs", "outputs"))]
    assert wheel.stat().st_size < 25e6


def test_the_wheel_runs_the_main_job_from_any_folder(site, tmp_path):
    arguments = ["-m", "ivtp.run", "experiment=ablation_groupsize", "debug=limit", "data.limit=5", "logger=none"]
    done = python(site, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = lines(tmp_path / "outputs" / "ablation_groupsize" / "results.jsonl")
    assert len(results) == 13
    where = python(site, "-c", "import ivtp.experiment.config as c; print(c.FOLDER)", cwd=tmp_path)
    assert where.stdout.strip() == str(site / "ivtp" / "configs")


SOMEBODYS = '''
from ivtp import Cut, Plan, Stage
from ivtp.core.scores import Random


def somebodys(shape, keep: int, layer: int = 0) -> Plan:
    """Random choice, after one layer."""
    return Plan(vision=Stage((Cut(layer, keep, "block"),), Random(0)))
'''


def test_a_pruner_in_somebody_else_s_wheel_is_found_and_run(site, tmp_path):
    other = tmp_path / "site"
    about = other / "somebody-1.0.dist-info"
    about.mkdir(parents=True)
    (other / "somebody.py").write_text(SOMEBODYS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ivtp.pruners]\nsomebodys = somebody:somebodys\n")
    both = os.pathsep.join([str(site), str(other)])
    arguments = ["pruner=somebodys", "pruner.layer=3", "budget.keep=9", "debug=limit", "data.limit=2", "logger=none"]
    done = python(both, "-m", "ivtp.run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = lines(tmp_path / "outputs" / "run" / "results.jsonl")[-1]
    assert (row["label"], row["tokens"][-1], row["cuts"]["vision"]) == ("somebodys", 9, [[3, 9, "block"]])


def test_a_newcomer_s_experiment_with_a_pruner_of_their_own_runs_from_the_wheel(site, tmp_path):
    """The four lines of the README, in an empty folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^## Your own pruner.*?^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(script.splitlines()) == 4
    script = script.replace("python -m", f"{sys.executable} -m").rstrip() + " data.limit=2 logger=none\n"
    env = environment(PYTHONPATH=str(site))
    done = subprocess.run(
        ["bash", "-e"], input=script, capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    row = lines(tmp_path / "outputs" / "first" / "results.jsonl")[-1]
    assert (row["label"], row["tokens"][-1], bool(row["pruner_source"])) == ("mine", 36, True)


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    code = "import sys, json, ivtp; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not {"torch", "transformers", "lightning", "wandb", "hydra"} & set(json.loads(done.stdout))


def test_the_public_face_is_there():
    for name in (
        "load_model",
        "load_pruner",
        "prune",
        "list_pruners",
        "register_pruner",
        "Tokens",
        "Pruner",
        "Stage",
        "Cut",
        "Plan",
    ):
        assert name in dir(ivtp)
        assert getattr(ivtp, name)
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        ivtp.prunes  # noqa: B018


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_everything_that_is_imported_is_a_dependency():
    names = {"PIL": "pillow", "sklearn": "scikit-learn", "open_clip": "open_clip_torch", "hydra": "hydra-core"}
    names |= {"vl_convert": "vl-convert-python", "wandb_workspaces": "wandb-workspaces", "lmms_eval": "lmms-eval"}
    extras = project()["project"]["optional-dependencies"]
    wanted = [
        *project()["project"]["dependencies"],
        *(line for name, lines in extras.items() if name != "dev" for line in lines),
    ]
    asked = {re.match(r"[\w-]+", line).group().lower() for line in wanted}
    asked |= {"triton"}  # torch pins its own, where there is one
    imported = set()
    for path in (ROOT / "ivtp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in {full.split(".")[0] for full in found} - {"ivtp", *sys.stdlib_module_names}:
                imported.add(names.get(name, name))
    assert imported <= asked, imported - asked
    assert len(imported) > 8


def requirements() -> list:
    from packaging.requirements import Requirement

    extras = project()["project"]["optional-dependencies"].values()
    return [Requirement(line) for lines in (project()["project"]["dependencies"], *extras) for line in lines]


def pins(text: str) -> dict[str, str]:
    found = (line.split("==") for line in text.splitlines() if not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


@pytest.mark.parametrize("versions", ["tested", "lowest"])
def test_versions_that_are_tested_lie_within_the_ranges_for_users(versions):
    """constraints.txt makes an installation that was seen to work; what pyproject.toml asks for is in it."""
    if versions == "tested":
        text = (ROOT / "constraints.txt").read_text()
    else:
        made = [sys.executable, ROOT / ".ci" / "lowest.py"]
        text = subprocess.run(made, capture_output=True, text=True, check=True).stdout
    pinned = pins(text)
    for requirement in requirements():
        if requirement.name != "ivtp":
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]}"
    assert not pinned.keys() & {"ivtp"}


def test_versions_agree():
    assert version("ivtp") == ivtp.__version__
    assert f"version: {ivtp.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    for part in (
        "Apache License",
        "Version 2.0, January 2004",
        "9. Accepting Warranty",
        "END OF TERMS AND CONDITIONS",
        "APPENDIX",
    ):
        assert part in text


def test_make_help_explains_every_target():
    makefile = (ROOT / "Makefile").read_text()
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    assert len(targets) > 8
    for target in targets:
        assert f"make {target} " in shown
    assert {"install", "lint", "format", "test", "run", "wheel", "clean"} <= set(targets)


def test_make_and_ci_say_what_the_readme_says():
    readme = (ROOT / "README.md").read_text()
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in (
        'pip install -e ".[dev]" -c constraints.txt',
        "python -m ivtp.run experiment=ablation_groupsize",
        "python -m sphinx -W -b html docs docs/_build",
    ):
        assert command in readme
        assert command in ci.replace('\\"', '"')
        assert command.removeprefix("python ") in makefile
    assert re.search(r"^pytest$", readme, re.MULTILINE)
    assert re.search(r"^pytest$", ci, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=False).returncode == 0


def test_yaml_files_of_the_project_can_be_read():
    from omegaconf import OmegaConf

    citation = OmegaConf.load(ROOT / "CITATION.cff")
    assert citation.title == "ivtp"
    assert citation.references[0].doi == "10.1007/978-3-031-72643-9_13"
    (repository,) = OmegaConf.load(ROOT / ".pre-commit-config.yaml").repos
    assert {hook.id for hook in repository.hooks} >= {
        "ruff",
        "ruff-format",
        "end-of-file-fixer",
        "check-added-large-files",
    }


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"]


def test_the_workflows_test_the_supported_versions_of_python_by_ci_run():
    about, job = project()["project"], workflow("ci.yml")["test"]
    marks = [c.rpartition(" :: ")[2] for c in about["classifiers"] if c.startswith("Programming Language :: Python ::")]
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == marks
    assert about["requires-python"] == f">={marks[0]}"
    assert {*matrix["versions"], *(row["versions"] for row in matrix["include"])} == {"tested", "lowest", "newest"}
    assert any(step.get("run", "").startswith(".ci/run ") for step in job["steps"])


def test_a_release_builds_checks_and_runs_the_wheel():
    commands = "\n".join(step.get("run", "") for step in workflow("release.yml")["build"]["steps"])
    for part in ("-m build", "twine check", "install dist/*.whl", "-m ivtp.run experiment=ablation_groupsize"):
        assert part in commands


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.*")), ids=lambda path: path.name)
def test_files_that_github_s_forms_name_exist(path):
    for name in re.findall(r"\b(?:docs|tests)/[\w/.-]*\w|\b[A-Z]+\.md\b", path.read_text()):
        assert name == "docs/_build" or (ROOT / name).exists(), name
