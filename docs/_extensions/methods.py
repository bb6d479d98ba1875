"""The directive `methods`: registered pruners from their functions, settings and docstrings.

.. methods:: table       one line for each: its first sentence, where it prunes, its FLOPs
.. methods:: SITE        signature and docstring of those that prune at SITE (a key of SITES)
"""

import inspect

from docstrings import inline
from sphinx.util.docutils import SphinxDirective
from transformers import LlavaConfig

import ivtp
from ivtp.core.flops import cost
from ivtp.pruners import PRUNERS, shipped_pruners, summary

SHAPE = ivtp.shape_of(LlavaConfig())  # transformers' defaults are the sizes of LLaVA-1.5-7B
KEEP, TEXT = 64, 512
SITES = {"vision": "vision tower", "language": "language model", "both": "both", "image": "image", "none": "–"}


def plan(name: str) -> ivtp.Plan:
    keep = {"keep": KEEP} if "keep" in inspect.signature(PRUNERS[name]).parameters else {}
    return ivtp.load_pruner(name, SHAPE, **keep)


def path(name: str) -> str:
    return f"{PRUNERS[name].__module__}.{PRUNERS[name].__qualname__}"


class Methods(SphinxDirective):
    required_arguments = 1

    def run(self) -> list:
        (wanted,) = self.arguments
        if wanted == "table":
            lines = self.table()
        elif wanted in SITES:
            names = [name for name in shipped_pruners() if plan(name).site == wanted]
            lines = [line for name in names for line in (f".. autofunction:: {path(name)}", "")]
        else:
            raise self.error(f"methods:: {wanted} is not one of table, {', '.join(SITES)}")
        return self.parse_text_to_nodes("\n".join(lines))

    @staticmethod
    def table() -> list[str]:
        lines = [".. list-table::", "   :header-rows: 1", ""]
        rows = [("name", "method", "prunes in", "TFLOPs")]
        for name in shipped_pruners():
            link = f":py:func:`{name} <{path(name)}>`"
            rows.append(
                (
                    link,
                    inline(summary(name)),
                    SITES[plan(name).site],
                    f"{cost(SHAPE, plan(name), TEXT, convention='paper').total / 1e12:.2f}",
                )
            )
        for row in rows:
            lines += [f"   {' ' if column else '*'} - {cell}" for column, cell in enumerate(row)]
        return lines


def setup(app) -> dict:
    app.add_directive("methods", Methods)
    return {"parallel_read_safe": True}
