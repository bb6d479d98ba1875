"""Terminal output; text from data is never markup or a control sequence."""

from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ivtp.report.tables import Table
from ivtp.text import one_line


class PlainConsole(Console):
    """Console that shows strings, cells of tables included, as they are; styles are given as `rich.text.Text`."""

    def __init__(self, **settings) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **how) -> Text:
        """Escape a string; rich calls this for every string that it shows or measures."""
        return super().render_str(one_line(text), **how)


def print_table(table: Table, console: Console, wrap: bool = True) -> None:
    """Print a table with its note; wrap folds long cells."""
    shown = _drawn(table, wrap)
    _fitted(console, shown).print(shown)


def as_text(table: Table) -> str:
    """Text of a table as in a terminal."""
    shown = _drawn(table)
    console = _fitted(PlainConsole(), shown)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().rstrip()


def _drawn(table: Table, wrap: bool = True) -> RichTable:
    shown = RichTable(title=table.title, caption=table.note or None)
    folding: dict[str, Any] = {"overflow": "fold", "max_width": 60} if wrap else {"no_wrap": True}
    for i, head in enumerate(table.heads):
        shown.add_column(head, justify="left" if i == 0 else "right", **folding)
    for i, line in enumerate(table.lines):
        if i and table.sections and table.sections[i] != table.sections[i - 1]:
            shown.add_section()
        shown.add_row(*line)
    return shown


def _fitted(console: Console, shown: RichTable) -> Console:
    """Console as wide as the table, if it writes to a pipe, which has no width: wrapped cells cannot be read."""
    if console.is_terminal:
        return console
    width = console.measure(shown, options=console.options.update(width=1000)).maximum
    return PlainConsole(file=console.file, width=width)
