"""How every command of the package ends: 0 done, 2 a request that cannot be met, said in one line on standard error."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence

from ivtp.registry import Terminated, UserError
from ivtp.text import one_line


def command(arguments: Sequence[str] | None, usage: Callable[[], str], work: Callable[[list[str]], object]) -> int:
    """Print the usage where it is asked for, else do the work; the exit status.

    arguments  None: those of the process
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if any(argument in ("-h", "--help") for argument in given):
            print(usage().strip())
        else:
            work(given)
    except UserError as error:
        print(f"ivtp: {one_line(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        # Of a disk that is full or gone while a library writes; what was finished before is on it already.
        where = f" {error.filename}" if error.filename else ""
        said = one_line(f"{where}: {error.strerror or error}")
        print(
            f"ivtp: cannot read or write{said}; make room or choose another folder with output=FOLDER; the same command goes "
            "on from here",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        print("ivtp: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    return 0
