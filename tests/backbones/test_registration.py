"""Registration of families: found in the source, imported on first use, never twice under one name."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.families import FAMILIES

from ivtp.backbones.family import Family, language_families, register_family

ROOT = Path(__file__).parents[2]


def test_every_family_with_a_language_model_has_a_maker():
    """So that the oracles of test_families.py run over it."""
    assert language_families() == sorted(FAMILIES)


def test_a_second_family_of_one_name_is_refused():
    with pytest.raises(ValueError, match="'llava_next' is already registered by ivtp"):

        @register_family("llava_next")
        class Another(Family):
            pass


def test_a_family_of_another_package_registers_itself():
    from types import SimpleNamespace

    from ivtp.backbones import family

    @register_family("of_another_package")
    class Own(Family):
        def shape(self, model):
            return "its own shape"

    try:
        assert family.shape_of(SimpleNamespace(model_type="of_another_package")) == "its own shape"
    finally:
        del family._families["of_another_package"]


def test_a_lookup_imports_no_other_family():
    """Names come from the source: timm's family must not wait for transformers, and none for open_clip."""
    code = (
        "import sys\n"
        "from ivtp.backbones.family import family_of, language_families\n"
        "assert 'llava' in language_families()\n"
        "heavy = {'transformers', 'timm', 'open_clip'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import timm\n"
        "family_of(timm.create_model('vit_tiny_patch16_224'))\n"
        "assert 'transformers' not in sys.modules and 'open_clip' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('ivtp.backbones.families.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
