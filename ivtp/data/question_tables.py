"""Read the table of a folder of questions: JSON lines, a JSON list, CSV or parquet, one row per question."""

import codecs
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ivtp.data.failures import DataError
from ivtp.data.open_image import ImageError, check_regular

COLUMNS = ("id", "image", "images", "question", "answer", "answers", "family", "patches")
LISTS = ("images", "answers", "patches")


def read_table(folder: Path) -> Iterator[tuple[str, dict]]:
    """Read the one table in a folder as (file and line, row); raises DataError for no table, several, or a damaged one.

    In CSV and parquet an empty cell is None. In CSV lists are written as JSON.
    """
    tables = [folder / name for name in READERS if os.path.exists(folder / name)]
    if not tables:
        raise DataError(
            f"{folder} holds none of {', '.join(READERS)}; data.path must be a folder with one of them and its images"
        )
    if len(tables) > 1:
        raise DataError(f"{folder} holds {' and '.join(path.name for path in tables)}; keep one of them")
    (table,) = tables
    try:
        check_regular(table)
        yield from READERS[table.name](table)
    except ImageError as error:
        raise DataError(f"{table} cannot be read ({error})") from error
    except OSError as error:
        raise DataError(f"{table} cannot be read ({error.strerror or error})") from error


def _text(table: Path) -> str:
    content = table.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{table}, line {line}: cannot be read as UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise DataError(f"{where}: not JSON that can be read (nested too deeply)") from None
    except ValueError as error:  # also for a number with thousands of digits
        raise DataError(f"{where}: not JSON ({error})") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON")


def _json_lines(table: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_text(table).split("\n"), start=1):
        if line.strip():
            where = f"{table}, line {number}"
            yield where, _object(_json(line, where), where)


def _json_list(table: Path) -> Iterator[tuple[str, dict]]:
    rows = _json(_text(table), str(table))
    if not isinstance(rows, list):
        raise DataError(f"{table}: must be a list of objects; one object a line is questions.jsonl")
    for number, row in enumerate(rows, start=1):
        where = f"{table}, item {number}"
        yield where, _object(row, where)


def _object(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object with id, image, question and answer")
    return row


def _csv(table: Path) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(_text(table), newline=""), strict=True, skipinitialspace=True)
    limit = csv.field_size_limit(sys.maxsize)  # a long question is refused as a question, not as a damaged table
    try:
        _check_columns(table, [name.strip() for name in reader.fieldnames or []])
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        for row in reader:
            where = f"{table}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: has not the {len(reader.fieldnames)} cells of the first line")
            row: dict = {name: row[name] or None for name in COLUMNS if name in row}
            for name in LISTS:
                if cell := row.get(name):
                    row[name] = _json(cell, f"{where}, column {name!r}")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(table: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f'{table} needs pyarrow; pip install "ivtp[parquet]", or write the table as questions.csv'
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            names = file.schema_arrow.names
            _check_columns(table, names)
            rows = file.read(columns=[name for name in COLUMNS if name in names]).to_pylist()
    except DataError:
        raise
    except (ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{table}: not parquet that can be read ({str(error).strip().splitlines()[0]})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{table}, row {number}", row


def _check_columns(table: Path, names: list[str]) -> None:
    missing = [name for name in ("id", "question") if name not in names]
    if missing:
        raise DataError(
            f"{table} has no column {missing[0]!r}; its columns are {', '.join(map(repr, names)) or 'none'}"
        )
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise DataError(f"{table} has two columns {twice[0]!r}; keep one")


READERS: dict[str, Callable[[Path], Iterator[tuple[str, dict]]]] = {
    "questions.jsonl": _json_lines,
    "questions.json": _json_list,
    "questions.csv": _csv,
    "questions.parquet": _parquet,
}
