"""Exit status of commands: 0 done, 2 a request that cannot be met, with one line on standard error."""

import signal
import sys
from collections.abc import Callable, Sequence

from ivtp.registry import Terminated, UserError
from ivtp.text import one_line


def command(arguments: Sequence[str] | None, usage: Callable[[], str], work: Callable[[list[str]], object]) -> int:
    """Print the usage for --help, else do the work; return the exit status.

    arguments  None: those of the process
    """
    options = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if any(argument in ("-h", "--help") for argument in options):
            print(usage().strip())
        else:
            work(options)
    except UserError as error:
        print(f"ivtp: {one_line(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        # A library could not write, as to a full disk; finished results are on it already.
        where = f" {error.filename}" if error.filename else ""
        reason = one_line(f"{where}: {error.strerror or error}")
        print(
            f"ivtp: cannot read or write{reason}; make room or choose another folder with output=FOLDER; the same command goes "
            "on from here",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        print("ivtp: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    return 0
