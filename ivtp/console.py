"""The terminal: what comes from data is text there, never markup or a control sequence."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ivtp.text import one_line


class PlainConsole(Console):
    """A console whose strings, cells of tables included, are shown as they are; styles are given as `rich.text.Text`."""

    def __init__(self, **settings) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **how) -> Text:
        """Every string that rich shows or measures comes through here."""
        return super().render_str(one_line(text), **how)
