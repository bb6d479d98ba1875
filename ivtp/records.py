"""Results on disk: one JSON line per row of an experiment, one file of per-sample outcomes per row.

`results.jsonl` is the source of truth; everything else (table, figures, W&B) is drawn from it. Lines are appended in
one write and synced, so a kill loses at most the line in flight; a torn line is set aside on the next start.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ivtp.registry import UserError
from ivtp.text import escaped


class RecordError(UserError):
    """A results folder that cannot be read or written; the message says which and why."""


def append(path: Path, rows: Iterable[dict]) -> None:
    """Add rows to a JSON-lines file, all in one write."""
    text = lines(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                written = file.write(text)
                if written != len(text):
                    raise OSError(errno.ENOSPC, f"only {written} of {len(text)} bytes fit")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)  # no torn line is left behind
                raise
    except OSError as error:
        raise _unwritable(path, error) from error


def lines(rows: Iterable[dict]) -> bytes:
    """Rows as JSON lines."""
    return b"".join(as_json(row) + b"\n" for row in rows)


def as_json(value: object, indent: int | None = None) -> bytes:
    """JSON in UTF-8; what would not be plain text in it stays an escape."""
    return escaped(json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)).encode()


def _unwritable(path: Path, error: OSError) -> RecordError:
    return RecordError(
        f"cannot write {path}: {error.strerror or error}; make room or choose another folder with output=FOLDER"
    )


def read(path: Path) -> tuple[list[dict], int]:
    """The rows of a JSON-lines file and how many torn lines were set aside (into `<file>.torn`)."""
    if not path.is_file():
        return [], 0
    rows, torn = [], []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no line end")
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            rows.append((line, row))
        except ValueError:
            torn.append(line)
    if torn:
        aside = path.with_name(path.name + ".torn")
        replace(aside, (aside.read_bytes() if aside.exists() else b"") + b"".join(torn))
        replace(path, b"".join(line for line, _ in rows))
    return [row for _, row in rows], len(torn)


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # it may not even be there
            temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def finite(value):
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def key(*parts) -> str:
    """A short hash of anything JSON can hold: the same request by the same code gives the same key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(files: Sequence[Path]) -> str:
    """A hash of files' names and contents.

    Every byte counts, since an edit may change a few tensors in the middle of a file of the same size. That takes about a
    second per GB, once per run; checkpoints from the hub are known by their commit instead.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def code_version() -> str:
    """A hash of this package's own source: results of other code are not taken for this one's."""
    return fingerprint(list(Path(__file__).parent.rglob("*.py")))
