"""One process that runs commands of the package one after another: importing everything anew costs seconds each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from importlib import import_module
from io import TextIOBase
from unittest.mock import patch


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit status, standard output and standard error."""

    status: int
    out: str
    err: str


class Shell:
    """A process with an environment; its libraries read it once, as those of a user's terminal session do."""

    def __init__(self, env: dict[str, str], cwd) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.hub.shell"],
            cwd=cwd,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, *arguments: str, module: str = "ivtp.run", watched: bool = False, **env: str) -> Done:
        """`python -m MODULE ARGUMENTS`, with more environment variables for this command.

        watched  standard error is a terminal
        """
        print(json.dumps([module, arguments, env, watched]), file=self.process.stdin, flush=True)
        return Done(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Output(TextIOBase):
    """Standard output or error, for as long as the process lives: loggers keep the stream that they saw first."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.terminal = False

    def isatty(self) -> bool:
        return self.terminal

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
    for line in sys.stdin:
        module, arguments, env, sys.stderr.terminal = json.loads(line)
        with patch.dict(os.environ, env):
            try:
                status = import_module(module).main(arguments)
            except Exception:  # as the interpreter does
                traceback.print_exc()
                status = 1
        done = Done(status, sys.stdout.take(), sys.stderr.take())
        print(json.dumps(asdict(done)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
