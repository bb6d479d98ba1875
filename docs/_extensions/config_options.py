"""The directive `config-options`: every option of a config group with the first comment line of its file."""

from docstrings import inline
from sphinx.util.docutils import SphinxDirective

from ivtp.experiment.config import FOLDER, options


class ConfigOptions(SphinxDirective):
    """`.. config-options:: GROUP`, such as data, model or experiment."""

    required_arguments = 1

    def run(self) -> list:
        (group,) = self.arguments
        for path in (FOLDER / group).glob("*.yaml"):
            self.env.note_dependency(str(path))
        lines = [".. list-table::", "   :header-rows: 1", "", f"   * - ``{group}=``", "     - "]
        for name, about in options(group).items():
            lines += [f"   * - ``{name}``", f"     - {inline(about)}"]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app) -> dict:
    app.add_directive("config-options", ConfigOptions)
    return {"parallel_read_safe": True}
