"""Names: no two meanings, helpful errors, and pruners from other packages."""

import subprocess
import sys
import textwrap

import pytest
from conftest import make_clip

import ivtp
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
from ivtp import Cut, Plan, Pruner, register_pruner

@register_pruner
def first_patches(shape, keep: int):
    return Plan(vision=Pruner((Cut(0, keep),), lambda seen, tokens: -tokens.of_visual(tokens.position).float()))

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
        from ivtp.pruning.cost import Layers, Shape
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
