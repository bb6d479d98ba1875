"""Judges: language models behind an API that grade answers for some lmms-eval tasks.

lmms-eval calls a judge inside its own functions, reads its name from environment variables, and after a failed call goes on
with a score of zero or a random one. Here a judge must be named in the config, and a failed call is an error.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from unittest.mock import patch

from ivtp.data.failures import DataError

SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
NO_JUDGE = {"API_TYPE": "openai", "OPENAI_API_KEY": "none", "OPENAI_API_URL": "http://localhost"}
"""Environment in which a task that needs a judge gets as far as calling it."""


class JudgeError(DataError):
    """Call of a judge that is not named in the config, or that fails."""


class NetworkUse(BaseException):
    """Use of the network by a task. Not an Exception: lmms-eval catches those and scores zero."""


def judge_variables(judge: Mapping | None) -> dict[str, str] | None:
    """Environment variables of `data.judge`; keys are refused, since configs are recorded."""
    if judge is None:
        return None
    for name in judge:
        if SECRET.search(name):
            raise DataError(f"data.judge.{name}: configs are recorded; leave {name} in the environment")
    return {name: str(value) for name, value in judge.items()}


@contextmanager
def judge_environment(judge: Mapping[str, str] | None) -> Iterator[None]:
    """Context in which lmms-eval finds this judge in the environment, and prints nothing."""
    with (
        patch.dict(os.environ, NO_JUDGE if judge is None else judge),
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        yield


@contextmanager
def grading(judge: Mapping[str, str] | None, task: str) -> Iterator[None]:
    """The same context while a task grades: raises JudgeError if the judge fails, or if none is named and one is called."""
    from loguru import logger

    failures: list[str] = []

    def refuse(*_, **__):
        raise NetworkUse

    def failed(message) -> bool:
        return message["level"].no >= 40 or "fail" in message["message"].lower()

    with ExitStack() as stack:
        stack.enter_context(judge_environment(judge))
        if judge is None:
            for name in ("getaddrinfo", "create_connection"):
                stack.enter_context(patch.object(socket, name, refuse))
        else:
            sink = logger.add(lambda message: failures.append(message.record["message"]), level="INFO", filter=failed)
            stack.callback(logger.remove, sink)
        try:
            yield
        except NetworkUse:
            raise JudgeError(
                f"task {task!r} asks a judge, a model behind an API; name one, e.g. "
                "'data.judge={MODEL_VERSION: gpt-4o-2024-11-20}' with OPENAI_API_KEY in the environment"
            ) from None
        finally:
            if failures:
                raise JudgeError(f"the judge of task {task!r} failed: {failures[0].splitlines()[0][:200]}")
