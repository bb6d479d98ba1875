"""Results on disk: one JSON line per row of an experiment, one file of per-sample outcomes per row.

`results.jsonl` is the source of truth; everything else (table, figures, W&B) is drawn from it. Lines are appended in
one write and synced, so a kill loses at most the line in flight; a torn line is set aside on the next start. One process
at a time writes to a folder: see `only_writer`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from filelock import FileLock, Timeout

from ivtp.data.outcomes import Outcome, is_outcome
from ivtp.registry import UserError
from ivtp.text import escaped

SCHEMA = 3
"""Version of the lines of results.jsonl, blind.jsonl, costs.jsonl and outcomes/. Lines of version 1 state none."""
RENAMED_METRICS = {"acc_early": "early_accuracy", "hit": "hit_rate", "share": "target_share"}
"""Metrics that had other names in version 1."""
RENAMED_FIELDS = {"hit": "target_hit", "share": "target_share"}
"""Fields of outcomes that had other names before version 3."""


LOCK = ".lock"
"""File in a folder of results that its writer locks; `.lock.json` beside it says who that is."""
PATIENCE = 10.0
"""Seconds to wait for a lock: what is left of a run that was killed, as its workers, ends within them."""


class RecordError(UserError):
    """A results folder that cannot be read or written; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of an experiment, from planning to the page; a line of `results.jsonl`.

    Planning fills in the request, the cuts and their cost; evaluation the metrics; the run what they depend on.
    """

    key: str = ""  # hash of the request, the model, the data and the code: equal keys, equal results

    # Request
    label: str
    series: str = ""  # line of the plot
    section: str = ""  # part of the table
    pruner: dict = field(default_factory=dict)
    budget: dict = field(default_factory=dict)
    position_ids: str = "keep"
    paper: str | None = None  # row of the paper that this one repeats
    stand_in: str | None = None  # method of which only the cost is known
    seeds_of: str | None = None  # label of the row of which this is one seed

    # Plan
    tokens: list[int] = field(default_factory=list)  # visual tokens before pruning and after each cut
    average_tokens: float | None = None
    cuts: dict[str, list] = field(default_factory=dict)  # per site: layer, kept tokens and place of each cut
    tflops: dict[str, float] = field(default_factory=dict)

    # Evaluation
    metrics: dict = field(default_factory=dict)  # mean, standard error and n per metric, and the number of images
    failed: dict | None = None  # number and causes of samples without a result
    speed: dict = field(default_factory=dict)
    drawable: bool = True  # whether kept tokens are patches of one square grid
    fewer_crops: int | None = None  # images that the checkpoint would have cut into more crops
    counted: dict | None = None  # FLOPs per part of one sample: counted by torch, and in closed form
    words: dict | None = None  # words of the instructions that pass τ
    seeds: int | None = None  # number of seeds that were drawn together

    # Circumstances
    experiment: str = ""
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    prompt: str = ""
    text_encoder: dict | None = None
    pruner_source: str | None = None
    code: str = ""
    text_tokens: int | None = None
    reference: str | None = None  # reference token of the vision tower
    seed: int | None = None
    versions: dict = field(default_factory=dict)
    git: str | None = None
    machine: dict = field(default_factory=dict)
    time: str = ""

    def line(self) -> dict:
        """The result as a line of `results.jsonl`."""
        values = {f.name: getattr(self, f.name) for f in fields(Result)}
        optional = ("stand_in", "failed", "fewer_crops", "counted", "words", "seeds")
        return {"schema": SCHEMA} | {k: v for k, v in values.items() if v is not None or k not in optional}


def upgrade(line: dict, path: Path) -> dict:
    """Convert a line of an older schema version to the present one, without its version number.

    Raises RecordError for a line of a newer version.
    """
    line = dict(line)
    version = line.pop("schema", 1)
    if version > SCHEMA:
        raise RecordError(f"{path} has schema version {version}, but this ivtp reads at most {SCHEMA}; update ivtp")
    if version < 2:
        if "asked" in line:  # of costs.jsonl, of the page's viewer
            line["target" if "picture" in line else "budget"] = line.pop("asked")
        if "metrics" in line:
            line["metrics"] = {RENAMED_METRICS.get(name, name): value for name, value in line["metrics"].items()}
    if version < 3:
        line = {RENAMED_FIELDS.get(name, name): value for name, value in line.items()}
    return line


def read_results(path: Path) -> tuple[list[Result], int]:
    """Results of `results.jsonl` or `blind.jsonl`, and the number of torn or foreign lines that were set aside."""
    lines, torn = read(path)
    foreign = set_aside(path, lines, is_result)
    return _results(lines), torn + foreign


def glance(path: Path) -> list[Result]:
    """Results of a file that another process may be writing: what cannot be used stays where it is."""
    return _results([upgrade(row, path) for _, row in _parsed(path) if row is not None])


def _results(rows: Iterable[dict]) -> list[Result]:
    names = {f.name for f in fields(Result)}
    return [Result(**{name: row[name] for name in row if name in names}) for row in rows if is_result(row)]


def drop_repeated(path: Path) -> int:
    """Set aside every result that says the same as the one before it of its row; return their number."""
    rows, last, repeated = read(path)[0], {}, set()
    for row in rows:
        content = row["metrics"], row.get("failed")
        if last.get((row["key"], row["label"])) == content:
            repeated.add(id(row))
        last[row["key"], row["label"]] = content
    return set_aside(path, rows, lambda row: id(row) not in repeated)


def is_result(row: dict) -> bool:
    """True if a line holds a result: a label, a key and metrics."""
    return all(isinstance(row.get(name), kind) for name, kind in (("label", str), ("key", str), ("metrics", dict)))


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Append results to `results.jsonl` or `blind.jsonl`."""
    append(path, (result.line() for result in results))


def read_outcomes(path: Path) -> list[Outcome]:
    """Outcomes of one row, in the order of the file."""
    return read(path)[0]


def outcomes_of(folder: Path, result: Result) -> list[Outcome]:
    """Outcomes on which a result rests; raises RecordError where they are not those that it was made of."""
    path = folder / "outcomes" / f"{result.key}.jsonl"
    outcomes = read_outcomes(path)
    if not agree(result, outcomes):
        raise RecordError(
            f"{path} does not hold the outcomes of row {result.label!r}: {len(outcomes)} lines; run the same experiment "
            "again, which evaluates what is missing"
        )
    return outcomes


def agree(result: Result, outcomes: list[Outcome]) -> bool:
    """True if a result was made of these outcomes: one of each sample, as many scored and failed ones, as many images."""
    if not all(map(is_outcome, outcomes)) or repeated(outcomes):
        return False
    answered = [outcome for outcome in outcomes if "failed" not in outcome]
    scored, images = sum(o["correct"] is not None for o in answered), len({o["image"] for o in answered})
    failed, metrics = (result.failed or {}).get("n", 0), result.metrics
    return (scored, images, len(outcomes) - len(answered)) == (metrics["accuracy"]["n"], metrics["images"], failed)


def repeated(outcomes: Iterable[Outcome]) -> set[str]:
    """Ids of the samples that have more than one outcome."""
    return {name for name, count in Counter(outcome["id"] for outcome in outcomes).items() if count > 1}


def with_schema(rows: Iterable[dict]) -> list[dict]:
    """Rows as lines of their file."""
    return [{"schema": SCHEMA, **row} for row in rows]


def append(path: Path, rows: Iterable[dict]) -> None:
    """Append rows to a JSON-lines file in one write."""
    text = lines(rows)
    with _writing(path), open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            written = file.write(text)
            if written != len(text):
                raise OSError(errno.ENOSPC, f"only {written} of {len(text)} bytes fit")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)  # no torn line is left behind
            raise


def lines(rows: Iterable[dict]) -> bytes:
    """Rows as JSON lines."""
    return b"".join(as_json(row) + b"\n" for row in rows)


def as_json(value: object, indent: int | None = None) -> bytes:
    """JSON in UTF-8; characters that are not plain text stay escapes."""
    return escaped(json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)).encode()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make the folder of a file; raise RecordError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another folder with output=FOLDER"
        ) from error


def read(path: Path) -> tuple[list[dict], int]:
    """Rows of a JSON-lines file in the present schema, and the number of torn lines set aside (into `<file>.torn`)."""
    parsed = _parsed(path)
    torn = [line for line, row in parsed if row is None]
    if torn:
        aside = path.with_name(path.name + ".torn")
        replace(aside, (aside.read_bytes() if aside.exists() else b"") + b"".join(torn))
        replace(path, b"".join(line for line, row in parsed if row is not None))
    return [upgrade(row, path) for _, row in parsed if row is not None], len(torn)


def _parsed(path: Path) -> list[tuple[bytes, dict | None]]:
    """Lines of a JSON-lines file with their rows, None for a torn one; none of a file that does not exist."""
    parsed: list[tuple[bytes, dict | None]] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        parsed.append((line, row if isinstance(row, dict) else None))
    return parsed


def set_aside(path: Path, rows: Sequence[dict], keep: Callable[[dict], bool]) -> int:
    """Move the rows of a file that cannot be used into `<file>.aside`; return their number."""
    unusable = [row for row in rows if not keep(row)]
    if unusable:
        append(path.with_name(path.name + ".aside"), with_schema(unusable))
        replace(path, lines(with_schema(row for row in rows if keep(row))))
    return len(unusable)


@contextmanager
def only_writer(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold a lock of a folder of results; raise RecordError in one line if another process holds it.

    The lock is the operating system's: it ends with its process, however that ends, and holds on a shared file system.
    """
    about = folder / f"{name}.json"
    with _writing(folder / name):
        lock = FileLock(folder / name)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise RecordError(
                f"{folder} is being written by {_writer(about)}; wait for it, or choose output=FOLDER"
            ) from None
    try:
        writer = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.strftime("%Y-%m-%d %H:%M:%S%z")}
        replace(about, as_json(writer))
        yield
    finally:
        about.unlink(missing_ok=True)
        lock.release()


def _writer(about: Path) -> str:
    try:
        writer = json.loads(about.read_text())
        return f"process {writer['pid']} on {writer['host']} since {writer['time']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or just ended
        return "another process"


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):  # it may not even be there
                temporary.unlink()
            raise


def finite(value):
    """Replace NaN and infinities, which JSON lacks, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def key(*parts) -> str:
    """Short hash of anything JSON can hold: the same request by the same code gives the same key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(files: Sequence[Path]) -> str:
    """Hash of the names and contents of files.

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
    """Hash of this package's own source: results of other code are not taken for its own."""
    return fingerprint(list(Path(__file__).parent.rglob("*.py")))


def finished(folder: Path) -> tuple[list[Result], dict]:
    """Results of the last run in their order, and its `experiment.json`.

    Of a run that was stopped before its end: the last result of every label, and nothing.
    """
    rows, _ = read_results(folder / "results.jsonl")
    if not rows:
        raise UserError(f"{folder} has no results.jsonl with results; give the folder that a run wrote")
    about = folder / "experiment.json"
    about = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    by_key = {row.key: row for row in rows}
    if "keys" in about and all(key in by_key for key in about["keys"]):
        return [by_key[key] for key in about["keys"]], about
    return list({row.label: row for row in rows}.values()), {}
