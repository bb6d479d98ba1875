"""Sphinx configuration: `python -m sphinx -W -b html docs docs/_build`. The build needs no network and runs no notebook."""

import sys
from pathlib import Path

import ivtp

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "ivtp"
author = "The ivtp authors"
copyright = author
release = ivtp.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "config_options",
    "copied_pages",
    "docstrings",
    "methods",
]
exclude_patterns = ["_build", "_extensions", "jupyter_execute"]  # MyST-NB writes the last beside _build
smartquotes = False
default_role = "literal"  # single backticks in docstrings are code

myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/test_notebooks.py runs them

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
viewcode_line_numbers = True

html_theme = "furo"
html_title = f"ivtp {release}"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
