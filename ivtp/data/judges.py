"""Judges: models behind an API that some lmms-eval tasks ask what an answer is worth.

lmms-eval asks them inside its own functions, reads who they are from environment variables, and where a call fails it goes
on with a score of zero or a random one. Here no judge is asked that the config does not name, and none may fail.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from unittest.mock import patch

from ivtp.data.questions import DataError

SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
NOBODY = {"API_TYPE": "openai", "OPENAI_API_KEY": "none", "OPENAI_API_URL": "http://localhost"}
"""So that a task that asks a judge comes as far as asking."""


class JudgeError(DataError):
    """A judge is asked that nobody named, or it failed."""


class Reached(BaseException):
    """A task reached for the network. Not an Exception: lmms-eval catches those and scores zero."""


def checked(judge: Mapping | None) -> dict[str, str] | None:
    """The environment variables of `data.judge`; keys must not be among them, since configs are recorded."""
    if judge is None:
        return None
    for name in judge:
        if SECRET.search(name):
            raise DataError(f"data.judge.{name}: configs are recorded; leave {name} in the environment")
    return {name: str(value) for name, value in judge.items()}


@contextmanager
def environment(judge: Mapping[str, str] | None) -> Iterator[None]:
    """Within, lmms-eval finds this judge in the environment, and prints nothing."""
    with (
        patch.dict(os.environ, NOBODY if judge is None else judge),
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        yield


@contextmanager
def judged_by(judge: Mapping[str, str] | None, task: str) -> Iterator[None]:
    """The same while it judges: raises JudgeError if it asks a judge and there is none, or if the judge fails."""
    from loguru import logger

    said: list[str] = []

    def refuse(*_, **__):
        raise Reached

    def failed(message) -> bool:
        return message["level"].no >= 40 or "fail" in message["message"].lower()

    with ExitStack() as stack:
        stack.enter_context(environment(judge))
        if judge is None:
            for name in ("getaddrinfo", "create_connection"):
                stack.enter_context(patch.object(socket, name, refuse))
        else:
            sink = logger.add(lambda text: said.append(text.record["message"]), level="INFO", filter=failed)
            stack.callback(logger.remove, sink)
        try:
            yield
        except Reached:
            raise JudgeError(
                f"task {task!r} asks a judge, a model behind an API; name one, e.g. "
                "'data.judge={MODEL_VERSION: gpt-4o-2024-11-20}' with OPENAI_API_KEY in the environment"
            ) from None
        finally:
            if said:
                raise JudgeError(f"the judge of task {task!r} failed: {said[0].splitlines()[0][:200]}")
