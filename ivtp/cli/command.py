"""Exit status of commands: 0 done, 2 a request that cannot be met, with one line on standard error."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from ivtp import signals
from ivtp.registry import LAUNCHED, RankLost, UserError
from ivtp.text import one_line


def command(arguments: Sequence[str] | None, usage: Callable[[], str], work: Callable[[list[str]], object]) -> int:
    """Print the usage for --help, else do the work; return the exit status.

    arguments  None: those of the process
    """
    options = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with signals.handled():
            if any(argument in ("-h", "--help") for argument in options):
                print(usage().strip())
            else:
                work(options)
    except RankLost as error:  # what ended the other rank is said there
        return 2 if launched() else fail(error)
    except UserError as error:
        return fail(error)
    except OSError as error:
        # A library could not write, as to a full disk; finished results are on it already.
        where = f" {error.filename}" if error.filename else ""
        return fail(
            f"cannot read or write{where}: {error.strerror or error}; make room or choose another folder with "
            "output=FOLDER; the same command goes on from here"
        )
    except (signals.Stopped, KeyboardInterrupt) as stop:
        if not launched():
            print("ivtp: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, signals.Stopped) else signal.SIGINT)
    return 0


def launched() -> bool:
    """True in a rank that `ivtp.experiment.ranks.launch` has started, whose errors the starter prints."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(LAUNCHED)


def fail(error: object) -> int:
    """Print an error in one line, or hand it to the process that started this rank; return the exit status."""
    line = one_line(str(error))
    if launched():
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(UserError(line))
    else:
        print(f"ivtp: {line}", file=sys.stderr)
    return 2
