"""Your own questions: a folder with `questions.jsonl` and images."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from ivtp.registry import UserError


class DataError(UserError):
    """A sample or data set that cannot be used; the message names it."""


class Questions(Dataset):
    """`questions.jsonl`, one object a line: id, image (path inside the folder), question, answer; family and patches
    (indices of the patches that show what is asked about) if known.

    Items have the fields of `Scenes`. Raises DataError, naming the line or sample, for what is missing or unreadable.
    """

    def __init__(self, path: str | Path, patch_count: int = 0) -> None:
        self.folder, self.patch_count = Path(path), patch_count
        table = self.folder / "questions.jsonl"
        if not table.is_file():
            raise DataError(f"{table} does not exist; data.path must be a folder with questions.jsonl and its images")
        try:
            lines = table.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{table} cannot be read as UTF-8 text ({error})") from error
        self.rows = [self._row(line, f"{table}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
        if not self.rows:
            raise DataError(f"{table} holds no question; write one JSON object a line")
        if len({row["id"] for row in self.rows}) != len(self.rows):
            raise DataError(f"{table}: ids must be unique, they name the per-sample outcomes")

    def _row(self, line: str, where: str) -> dict:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: must be an object with id, image, question and answer")
        for key in ("id", "image", "question", "answer"):
            if not isinstance(row.get(key), str):
                raise DataError(f"{where}: {key!r} must be a text, but is {row.get(key)!r}")
        if not isinstance(row.get("family", ""), str):
            raise DataError(f"{where}: 'family' must be a text, but is {row['family']!r}")
        patches = row.get("patches", [])
        last = self.patch_count - 1
        if not isinstance(patches, list) or not all(type(p) is int and 0 <= p <= last for p in patches):
            raise DataError(f"{where}: 'patches' must be a list of patch numbers between 0 and {last}")
        if not row["question"].strip():
            raise DataError(f"{where}: sample {row['id']!r} has an empty question")
        image = (self.folder / row["image"]).resolve()
        if not image.is_relative_to(self.folder.resolve()):
            raise DataError(f"{where}: image {row['image']!r} lies outside the data folder")
        return row

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, item: int) -> dict:
        """A sample without its image."""
        row = self.rows[item]
        return {name: row.get(name, "all") for name in ("id", "question", "answer", "family")} | {
            "image_id": row["image"]
        }

    def __getitem__(self, item: int) -> dict:
        row = self.rows[item]
        try:
            with Image.open(self.folder / row["image"]) as image:
                picture = image.convert("RGB")
        # What Pillow raises for files that are missing, damaged, or bombs.
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise DataError(
                f"sample {row['id']!r}: image {row['image']!r} cannot be read ({error}); mend the file or its line"
            ) from error
        patches = torch.zeros(self.patch_count, dtype=torch.bool)
        patches[row.get("patches", [])] = True
        return {
            "id": row["id"],
            "image_id": row["image"],
            "image": picture,
            "question": row["question"],
            "answer": row["answer"],
            "family": row.get("family", "all"),
            "patches": patches,
        }
