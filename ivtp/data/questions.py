"""Questions of your own: a folder with a table of questions and their images."""

import hashlib
import math
import os
import re
from pathlib import Path
from reprlib import repr as short

import torch
from torch.utils.data import Dataset

from ivtp.data.answers import ANNOTATORS, Scorer
from ivtp.data.failures import DataError
from ivtp.data.open_image import ImageError, check_regular, image_size, open_image
from ivtp.data.question_tables import read_table


class Questions(Dataset):
    """Folder with `questions.jsonl` (or `.json`, `.csv`, `.parquet`; see `read_table`), one row per question.

    id        a text or number, unique
    image     path of an image inside the folder; symbolic links in the folder are followed, wherever they lead. Or
    images    a list of such paths. A question without an image has `"image": null`
    question  a text
    answer    the accepted answer, a text or number. Or
    answers   a list of them, or of objects with "answer", as in VQAv2. Neither: answers are recorded, but not scored
    family    of questions that accuracy is also given for
    patches   target patches: indices of the patches of the one image that show the answer

    match, answers  of the scorer: see `Scorer`
    Items have the fields of `Scenes2`; of several answers or none also `answers`, and of `images` those in place of
    `image`. Raises DataError: of the table when it is read, naming the line; of an image when it is opened, naming the
    sample.
    """

    def __init__(self, path: str | Path, patch_count: int = 0, match: str = "exact", answers: str = "any") -> None:
        self.folder, self.patch_count = Path(path), patch_count
        self.scorer = Scorer(match, answers)
        self.rows: list[dict] = []
        self._files: dict[str, tuple[str, tuple[int, int] | None]] = {}
        lines: dict[str, str] = {}
        for where, row in read_table(self.folder):
            row = self._row(row, where)
            if row["id"] in lines:
                raise DataError(
                    f"{where}: id {short(row['id'])} stands also in {lines[row['id']].rpartition(', ')[2]}; ids must be "
                    "unique, they name the per-sample outcomes"
                )
            lines[row["id"]] = where
            self.rows.append(row)
        if not self.rows:
            raise DataError(f"{self.folder} holds no question; write one JSON object a line into questions.jsonl")

    def _row(self, cells: dict, where: str) -> dict:
        """Check the fields of a row; return it with images as a list of paths and answers as a list."""
        row = {key: value for key, value in cells.items() if value is not None}
        if "image" not in cells and "images" not in cells:
            raise DataError(f"{where}: must have 'image' or 'images' (null for a question without an image)")
        for one, several in (("image", "images"), ("answer", "answers")):
            if one in row and several in row:
                raise DataError(f"{where}: has {one!r} and {several!r}; keep one of them")
        name = text(row, "id", where, numbers=True)
        question, family = text(row, "question", where), text({"family": "all"} | row, "family", where)
        if not question.strip():
            raise DataError(f"{where}: sample {short(name)} has an empty question")
        images = texts(row, "images", where) if "images" in row else []
        if "image" in row:
            images = [text(row, "image", where)]
        patches, last = row.get("patches", []), self.patch_count - 1
        if not isinstance(patches, list) or not all(type(p) is int and 0 <= p <= last for p in patches):
            raise DataError(f"{where}: 'patches' must be a list of patch numbers between 0 and {last}")
        if patches and len(images) != 1:
            raise DataError(f"{where}: 'patches' are those of one image, but the sample has {len(images)}")
        return {
            "id": name,
            "images": [self._inside(image, where) for image in images],
            "several": "images" in row or not images,
            "question": question,
            "answers": self._answers(row, where),
            "family": family,
            "patches": patches,
        }

    def _answers(self, row: dict, where: str) -> list[str]:
        if "answers" not in row:
            answers = [text(row, "answer", where, numbers=True)] if "answer" in row else []
        else:
            answers = row["answers"]
            if isinstance(answers, list):
                answers = [each.get("answer") if isinstance(each, dict) else each for each in answers]
            answers = texts({"answers": answers}, "answers", where, numbers=True)
        if not any(answer.strip() for answer in answers):
            return []
        if self.scorer.answers == "vqa" and len(answers) < ANNOTATORS:
            raise DataError(
                f"{where}: has {len(answers)} accepted answers, but VQA accuracy needs at least {ANNOTATORS}; use "
                "data.answers=any"
            )
        return answers if self.scorer.answers == "vqa" else [answer for answer in answers if answer.strip()]

    def _inside(self, image: str, where: str) -> str:
        """Path from the folder to an image, without ".."; targets of links are not checked."""
        root = os.path.abspath(self.folder)
        path = Path(os.path.normpath(os.path.join(root, image)))
        if not path.is_relative_to(root):
            raise DataError(
                f"{where}: image {short(image)} lies outside the data folder; link its folder into this one"
            )
        return path.relative_to(root).as_posix()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict:
        row = self.rows[item]
        images = []
        for name in row["images"]:
            try:
                images.append(open_image(self.folder / name))
            except ImageError as error:
                raise DataError(
                    f"sample {row['id']!r}: image {name!r} cannot be read ({error}); mend the file or its line"
                ) from error
        return self.texts(item) | ({"images": images} if row["several"] else {"image": images[0]})

    def texts(self, item: int) -> dict:
        """Fields of a sample without its images."""
        row = self.rows[item]
        patches, answers = torch.zeros(self.patch_count, dtype=torch.bool), row["answers"]
        patches[row["patches"]] = True
        return {
            "id": row["id"],
            "image_id": " + ".join(row["images"]) or row["id"],
            "question": row["question"],
            "answer": " | ".join(dict.fromkeys(answers)),
            "family": row["family"],
            "patches": patches,
            **({} if len(answers) == 1 else {"answers": answers}),
        }

    def sketch(self, item: int) -> tuple[dict, bytes]:
        """Fields of a sample with the `sizes` of its images (None for an unreadable one), and a hash of the files as their
        content: nothing is decoded."""
        sample, files = self.texts(item), [self._file(name) for name in self.rows[item]["images"]]
        content = "\n".join(hashed for hashed, _ in files).encode() + sample["patches"].numpy().tobytes()
        return sample | {"sizes": [size for _, size in files]}, content

    def _file(self, name: str) -> tuple[str, tuple[int, int] | None]:
        """Hash and size of an image file, read once for all questions about it."""
        if name not in self._files:
            path = self.folder / name
            try:
                check_regular(path)
                with open(path, "rb") as file:
                    hashed = hashlib.file_digest(file, "sha256").hexdigest()
                self._files[name] = hashed, image_size(path)
            except (ImageError, OSError):  # reading the sample reports the error
                self._files[name] = "unreadable", None
        return self._files[name]


def text(row: dict, key: str, where: str, numbers: bool = False) -> str:
    """Field of a row as text that can be encoded; `numbers`: a finite number becomes text."""
    value = row.get(key)
    if numbers and (type(value) is int or (type(value) is float and math.isfinite(value))):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a text, but is {short(value)}")
    if unusable := re.search("[\0\ud800-\udfff]", value):
        kind = "a NUL character" if unusable[0] == "\0" else "half of a surrogate pair"
        raise DataError(f"{where}: {key!r} holds {kind} ({unusable[0]!a}); remove it")
    return value


def texts(row: dict, key: str, where: str, numbers: bool = False) -> list[str]:
    """Field of a row as a list of texts; see `text`."""
    if not isinstance(row[key], list):
        raise DataError(f"{where}: {key!r} must be a list of texts, but is {short(row[key])}")
    return [text({key: value}, key, where, numbers) for value in row[key]]
