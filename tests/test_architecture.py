"""The direction of dependence, read from the imports; that `import ivtp` is cheap, and that functions take few parameters."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ivtp"
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, inside functions too, but not where it is started as a command."""
    found, tree = set(), ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["ivtp", *path.relative_to(ROOT).parts[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" if name in ("ivtp", "") else name for alias in node.names}
    return found


def layer(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


SHELVES = (
    "registry",
    "text",
    "signals",
    "core",
    "pruners",
    "backbones",
    "api",
    "data",
    "lmms",
    "evaluation",
    "results",
    "report",
    "experiment",
    "timing",
    "cli",
)
"""What lies on a shelf imports from it and from those before it."""
COMMANDS = {ROOT / "run.py", ROOT / "cost.py", ROOT / "bench.py", ROOT / "report" / "__main__.py"}
"""Names under which a user starts what lies in cli/."""


@pytest.mark.parametrize("path", [p for p in MODULES if p not in COMMANDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if path == ROOT / "__init__.py":
        return
    below = set(SHELVES[: SHELVES.index(layer(path)) + 1])
    own = {name.split(".")[1] for name in imports(path) if name.startswith("ivtp.")}
    assert own - {"__version__"} <= below, f"{path} reaches up to {own - below}"
    assert "ivtp" not in imports(path), f"{path} imports the public names"


@pytest.mark.parametrize("path", [p for p in MODULES if layer(p) == "core"], ids=lambda p: p.name)
def test_the_core_needs_torch_alone(path):
    own = {"ivtp", "torch", "jaxtyping", "__future__"} | ({"triton"} if path.name == "triton_sums.py" else set())
    outside = {name.split(".")[0] for name in imports(path)} - own
    assert outside <= sys.stdlib_module_names


def test_the_test_itself_sees_imports():
    """It must not pass because it found nothing."""
    assert {layer(p) for p in MODULES} >= set(SHELVES)
    assert "ivtp.core.tokens" in imports(ROOT / "core" / "loop.py")
    assert "transformers" in imports(ROOT / "api.py")


MOST_PARAMETERS = 7
KERNEL = "Triton's kernels take pointers, strides and sizes one by one"
MANY_PARAMETERS = {
    "load_model": "users give each setting of a checkpoint by its name",
    **dict.fromkeys(("logits_of", "row_kernel", "column_kernel"), KERNEL),
}
"""Functions that may take more, with the reason; so may registered pruners, whose parameters are the method's settings."""


def with_many_parameters(tree: ast.AST) -> list[str]:
    """Functions of a module with more than `MOST_PARAMETERS` named parameters besides `self`, but for pruners."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [argument for argument in taken if argument.arg not in ("self", "cls")]
            pruner = any("register_pruner" in ast.unparse(decorator) for decorator in node.decorator_list)
            if len(named) > MOST_PARAMETERS and not pruner:
                names.append(node.name)
    return names


def test_functions_take_few_parameters():
    assert with_many_parameters(ast.parse("def f(self, a, b, c, d, e, f, *, g): ...")) == []
    assert with_many_parameters(ast.parse("def f(self, a, b, c, d, e, f, *, g, h): ...")) == ["f"]
    many = [name for path in MODULES for name in with_many_parameters(ast.parse(path.read_text()))]
    assert many == list(MANY_PARAMETERS)


def test_import_ivtp_is_cheap():
    """`python -m ivtp... --help` and a typo must not wait for transformers."""
    code = (
        "import sys, ivtp\n"
        "heavy = {'torch', 'transformers', 'timm', 'wandb', 'lightning', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\nivtp.list_pruners()\n"
        "heavy = {'transformers', 'timm', 'wandb', 'lightning', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(ivtp.__all__) <= set(dir(ivtp))\nfor name in ivtp.__all__: getattr(ivtp, name)\n"
        "try: ivtp.nothing\nexcept AttributeError: pass\nelse: raise SystemExit('no AttributeError')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
