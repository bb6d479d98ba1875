"""Plugins: files and modules of a user, whose pruners are registered when they are imported."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ivtp.registry import UserError
from ivtp.text import one_line

_LOADED: set[Path | str] = set()


def load(plugins: Sequence[str]) -> None:
    """Import plugins, each a Python file or the name of a module; one that was loaded stays as it is.

    A file becomes the module of its own name, and can import the files beside it. Raises UserError, in one line, for one
    that is missing, fails, or registers no pruner.
    """
    for plugin in plugins:
        path = Path(plugin).expanduser().resolve() if plugin.endswith(".py") else None
        if (path or plugin) in _LOADED:
            continue
        from ivtp.pruners import PRUNERS

        before, name = set(PRUNERS.names()), plugin
        if path is not None:
            name = _importable(path)
        try:
            importlib.import_module(name)
        except Exception as error:  # the user's own code: whatever it raises is about the plugin
            where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
            reason = f"{type(error).__name__}: {one_line(str(error))}{where}"
            raise UserError(f"plugin {plugin!r} cannot be imported: {reason}") from error
        if before == set(PRUNERS.names()) and not any(PRUNERS[p].__module__.startswith(name) for p in before):
            raise UserError(f"plugin {plugin!r} registers no pruner; put @ivtp.register_pruner above its function")
        _LOADED.add(path or plugin)


def _importable(path: Path) -> str:
    """Put the folder of a file first on Python's path; return the name of its module."""
    if not path.is_file():
        raise UserError(f"plugin {str(path)!r} does not exist; give a Python file, or the name of a module")
    module = sys.modules.get(path.stem)
    if module is not None and Path(getattr(module, "__file__", None) or "").resolve() != path:
        raise UserError(f"plugin {str(path)!r}: a module {path.stem!r} is imported already; rename the file")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return path.stem
