"""Names: no two meanings, helpful errors, and pruners from other packages."""

import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import make_clip
from helpers.running import ROOT, environment

import ivtp
from ivtp.core.choices import CutSizes, Score
from ivtp.core.scores import Layerwise
from ivtp.registry import Registry, UnknownName


def test_a_duplicate_raises_and_the_same_function_does_not():
    registry = Registry("thing")

    @registry.register
    def one():
        return 1

    assert registry.register(one) is one
    with pytest.raises(ValueError, match=r"thing 'one' is already registered by .*; choose another name"):
        registry.register(type("other", (), {"__name__": "one", "__call__": lambda self: 2})())
    assert registry["one"]() == 1
    assert registry.names() == ["one"]
    assert "one" in registry
    assert "two" not in registry


def test_a_misspelt_name_is_told_what_was_meant():
    with pytest.raises(UnknownName, match=r"unknown pruner 'itvp'\. Did you mean 'ivtp'\? Known: .*topk") as error:
        ivtp.load_pruner("itvp", ivtp.shape_of(make_clip()))
    assert "\n" not in str(error.value)
    with pytest.raises(UnknownName, match=r"'kep'.* Did you mean 'keep'"):
        ivtp.load_pruner("topk", ivtp.shape_of(make_clip()), kep=3)


@pytest.mark.parametrize("keep", [0, -1, 26, 5.0, True, "5", None])
def test_a_budget_that_is_no_number_of_tokens_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep.*between 1 and 25") as error:
        ivtp.load_pruner("topk", ivtp.shape_of(make_clip()), keep=keep)
    assert "\n" not in str(error.value)


MODULE = """
from ivtp import Cut, Plan, Stage, register_pruner

@register_pruner
def first_patches(shape, keep: int):
    return Plan(vision=Stage((Cut(0, keep),), lambda seen, tokens: -tokens.of_visual(tokens.position).float()))

def none(shape):
    return Plan()
"""


def elsewhere(tmp_path, entry: str, code: str):
    """Run `code` in a fresh interpreter beside an installed third-party distribution with this entry point."""
    (tmp_path / "third_party.py").write_text(MODULE)
    dist = tmp_path / "third_party-1.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (dist / "entry_points.txt").write_text(f"[ivtp.pruners]\n{entry}\n")
    return subprocess.run(
        [
            sys.executable,
            "-W",
            "always",
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + textwrap.dedent(code),
        ],
        capture_output=True,
        text=True,
        cwd=ivtp.__path__[0] + "/..",
    )


@pytest.mark.parametrize("entry", ["first_patches = third_party:first_patches", "anything = third_party"])
def test_a_pruner_in_a_third_party_wheel_is_found(tmp_path, entry):
    """By an entry point that names the function, or a module that registers by decorator."""
    done = elsewhere(
        tmp_path,
        entry,
        """
        import ivtp
        names = ivtp.list_pruners()
        assert "first_patches" in names and "topk" in names and "anything" not in names, names
        from ivtp.core.flops import Layers, Shape
        plan = ivtp.load_pruner("first_patches", Shape(Layers(2, 8, 8, 1, 1, 8, 2), 9, 3), keep=4)
        assert plan.vision.schedule[0].keep == 4
        """,
    )
    assert done.returncode == 0, done.stderr


def test_an_entry_point_with_a_taken_name_raises(tmp_path):
    """Silently ignoring one of the two would report one method's numbers under the other's name."""
    done = elsewhere(tmp_path, "none = third_party:none", "import ivtp; ivtp.list_pruners()")
    assert "pruner 'none' of the entry point third_party:none is already registered by ivtp.pruners" in done.stderr


def test_a_broken_package_does_not_take_the_others_down(tmp_path):
    done = elsewhere(tmp_path, "lost = third_party:not_there", "import ivtp; print(ivtp.list_pruners())")
    assert done.returncode == 0
    assert "topk" in done.stdout
    assert "'lost' cannot be loaded" in done.stderr


ONE_FILE = """
from ivtp.core.flops import Shape
from ivtp.core.plan import Plan, Stage
from ivtp.core.schedule import Cut
from ivtp.core.scores import Random
from ivtp.pruners import register_pruner


@register_pruner
def early(shape: Shape, keep: int, layer: int = 1, seed: int = 0) -> Plan:
    \"\"\"Random choice once, early in the ViT.\"\"\"
    return Plan(vision=Stage((Cut(layer, keep),), Random(seed)))
"""


@pytest.fixture(scope="module")
def with_one_file_more(tmp_path_factory):
    """Run code in a copy of the package, its configs and its docs, with one file more in `ivtp/pruners`."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("ivtp", "configs", "docs/_extensions"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (copy / "ivtp" / "assets").symlink_to(ROOT / "ivtp" / "assets", target_is_directory=True)
    (copy / "ivtp" / "pruners" / "early.py").write_text(ONE_FILE)

    def run(*arguments: str) -> str:
        paths = f"{copy}:{copy / 'docs' / '_extensions'}:{environment().get('PYTHONPATH', '')}"
        done = subprocess.run(
            [sys.executable, *arguments], env=environment(PYTHONPATH=paths), capture_output=True, text=True, cwd=copy
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_pruner_is_one_file_for_help_and_config(with_one_file_more):
    assert "early                Random choice once, early in the ViT." in with_one_file_more(
        "-m", "ivtp.run", "--help"
    )
    code = """
        from ivtp.experiment.config import load_config
        config = load_config(["pruner=early", "pruner.layer=3", "seed=5"])
        print(dict(config.pruner))
        """
    assert with_one_file_more("-c", textwrap.dedent(code)).strip() == "{'name': 'early', 'layer': 3, 'seed': 5}"


def test_a_pruner_is_one_file_for_the_zoo(with_one_file_more):
    """Its rows are planned, at the same tokens and at the same cost as the others."""
    code = """
        from ivtp.experiment.config import load_config
        from ivtp.experiment.variants import variants
        from ivtp.experiment.planning import build_shape, plan_rows
        config = load_config(["experiment=zoo", "debug=limit"])
        rows = plan_rows(list(variants(config)), build_shape(config), 9, 9)
        print(*(row.label for row in rows if row.pruner["name"] == "early"), sep="; ")
        """
    labels = with_one_file_more("-c", textwrap.dedent(code)).strip().split("; ")
    assert labels == [
        *("early 1/9", "early 2/9", "early 1/3"),
        *("early as fastv 1/9", "early as fastv 2/9", "early as fastv 1/3"),
    ]


def test_a_pruner_is_one_file_for_the_page_of_methods(with_one_file_more):
    pytest.importorskip("sphinx", reason="sphinx is part of the docs extra")
    lines = with_one_file_more("-c", "import methods; print(*methods.Methods.table(), sep='\\n')").splitlines()
    (line,) = [number for number, line in enumerate(lines) if "early" in line and "py:func" in line]
    assert lines[line + 1 : line + 3] == ["     - Random choice once, early in the ViT.", "     - vision tower"]


SIZES = CutSizes(group=3, n=10, v=9, keep=4, references=1, heads=2, kv_heads=2, head_width=4, width=8)


class Declared:
    """A score of a user's own that declares some capabilities and inherits nothing."""

    needs = "last"
    asks_data = "it looks at its scores"

    def __call__(self, attentions, tokens):
        return None

    def flops(self, sizes):
        return sizes.n


def test_a_choice_of_ones_own_declares_as_much_as_it_likes():
    """A plain function, an object with some attributes, a class that inherits: all have all capabilities in a stage."""
    cuts = (ivtp.Cut(2, 4),)
    plain = ivtp.Stage(cuts, lambda attentions, tokens: None, metric=lambda attentions, tokens: None)
    assert (plain.needs, plain.metric.needs, plain.asks_data, plain.score.flops(SIZES)) == ("group", "last", None, 0)
    own = ivtp.Stage(cuts, Declared())
    assert (own.needs, own.reads_state, own.asks_data, own.score.flops(SIZES)) == (
        "last",
        False,
        Declared.asks_data,
        10,
    )

    class Inherits(Score):
        reads_target = True

        def __call__(self, attentions, tokens):
            return None

    inherits = ivtp.Stage(cuts, Inherits())
    assert (inherits.needs, inherits.reads_target, inherits.score.flops(SIZES)) == ("group", True, 0)
    score = Layerwise()
    assert ivtp.Stage(cuts, score).score is score
    call = Declared()
    assert ivtp.Stage(cuts, call) == ivtp.Stage(ivtp.Schedule(cuts), call)


def test_old_names_say_what_they_are_called_now():
    with pytest.raises(TypeError, match=r"ivtp\.Pruner.* is called ivtp\.Stage now") as error:
        ivtp.Pruner(schedule=(ivtp.Cut(2, 4),))
    assert "\n" not in str(error.value)
    with pytest.warns(DeprecationWarning, match="target_first"):
        old = ivtp.load_pruner("ivtp", shape(), keep=4, language_score="asked")
    assert old == ivtp.load_pruner("ivtp", shape(), keep=4, language_score="target_first")


def shape():
    from ivtp.core.flops import Layers, Shape

    return Shape(Layers(12, 8, 8, 1, 1, 8, 2), 9, 3, language=Layers(12, 8, 8, 1, 1, 8, 3))
