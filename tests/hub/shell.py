"""One process that runs commands of the package one after another: importing everything anew costs seconds each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from io import TextIOBase
from unittest.mock import patch


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


class Output(TextIOBase):
    """Standard output or error, for as long as the process lives: loggers keep the stream that they saw first."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        self.parts.append(text)
        return len(text)

    def take(self) -> str:
        """What was written since the last time."""
        text, self.parts = "".join(self.parts), []
        return text


def serve() -> None:
    """Read commands, a line each, and answer with what came of them."""
    answers, sys.stdout, sys.stderr = sys.stdout, Output(), Output()
    from ivtp.run import main

    for line in sys.stdin:
        arguments, env = json.loads(line)
        start = time.monotonic()
        with patch.dict(os.environ, env):
            status = main(arguments)
        done = Done(status, sys.stdout.take(), sys.stderr.take(), time.monotonic() - start)
        print(json.dumps(asdict(done)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
