"""One process that runs commands of the package one after another: importing everything anew costs seconds each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float


class Shell:
    """A process with an environment; its libraries read it once, as those of a user's terminal session do."""

    def __init__(self, env: dict[str, str], cwd) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hub.shell"], cwd=cwd, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, *arguments: str, **env: str) -> Done:
        """`python -m ivtp.run ARGUMENTS`, with more environment variables for this command."""
        print(json.dumps([arguments, env]), file=self.process.stdin, flush=True)
        return Done(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve() -> None:
    """Read commands, a line each, and answer with what came of them."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO
    from unittest.mock import patch

    answers, sys.stdout = sys.stdout, sys.stderr
    from ivtp.run import main

    for line in sys.stdin:
        arguments, env = json.loads(line)
        out, err, start = StringIO(), StringIO(), time.monotonic()
        with patch.dict(os.environ, env), redirect_stdout(out), redirect_stderr(err):
            status = main(arguments)
        done = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - start}
        print(json.dumps(done), file=answers, flush=True)


if __name__ == "__main__":
    serve()
