"""Questions of your own: what a folder must hold, and which line or sample is named where it does not."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ivtp.data.questions import DataError, Questions

ROW = {"id": "1", "image": "a.png", "question": "what is it ?", "answer": "a dog"}


def folder(tmp_path, *rows, image: bool = True):
    if image:
        Image.new("RGB", (20, 12), (200, 10, 10)).save(tmp_path / "a.png")
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (tmp_path / "questions.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_a_row_becomes_a_sample(tmp_path):
    data = Questions(folder(tmp_path, {**ROW, "family": "animals", "patches": [0, 3]}, "", {**ROW, "id": "2"}), 9)
    assert len(data) == 2
    sample = data[0]
    assert (sample["id"], sample["question"], sample["answer"], sample["family"]) == (
        "1",
        ROW["question"],
        "a dog",
        "animals",
    )
    assert sample["image"].mode == "RGB"
    assert sample["image"].size == (20, 12)
    assert sample["patches"].nonzero().flatten().tolist() == [0, 3]
    assert data[1]["family"] == "all"
    assert not data[1]["patches"].any()


def test_questions_about_one_image_are_known_to_be_about_one_image(tmp_path):
    """Their errors are not independent: the standard error counts images, not questions."""
    data = Questions(folder(tmp_path, ROW, {**ROW, "id": "2"}), 9)
    assert data[0]["image_id"] == data[1]["image_id"] == "a.png"


def test_text_is_kept_as_it_is_written(tmp_path):
    question = "qu’est-ce que c’est \u2028 \u0085 ?"
    data = Questions(folder(tmp_path, json.dumps({**ROW, "question": question}, ensure_ascii=False)))
    assert data[0]["question"] == question


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    folder(tmp_path, {**ROW, "image": "b.tif"})
    Image.new(mode, (7, 5)).save(tmp_path / "b.tif")
    assert Questions(tmp_path)[0]["image"].mode == "RGB"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object"),
        ({"id": "2", "image": "a.png", "question": "q"}, "line 2: 'answer' must be a text, but is None"),
        ({**ROW, "id": 2}, "line 2: 'id' must be a text, but is 2"),
        ({**ROW, "id": "2", "question": "  "}, "sample '2' has an empty question"),
        ({**ROW, "id": "2", "image": "../a.png"}, "lies outside the data folder"),
        ({**ROW, "id": "2", "image": "/etc/passwd"}, "lies outside the data folder"),
        ({**ROW, "id": "2", "family": 3}, "'family' must be a text, but is 3"),
        ({**ROW, "id": "2", "patches": [9]}, "'patches' must be a list of patch numbers between 0 and 8"),
        ({**ROW, "id": "2", "patches": "all"}, "'patches' must be a list"),
        (ROW, "ids must be unique"),
    ],
)
def test_the_line_that_cannot_be_used_is_named(tmp_path, row, said):
    with pytest.raises(DataError) as raised:
        Questions(folder(tmp_path, ROW, row), 9)
    assert said in str(raised.value)
    assert "questions.jsonl" in str(raised.value)


def test_a_folder_without_a_table_or_with_an_empty_one(tmp_path):
    with pytest.raises(DataError, match=r"questions\.jsonl does not exist; data\.path must be a folder"):
        Questions(tmp_path)
    with pytest.raises(DataError, match="holds no question"):
        Questions(folder(tmp_path))
    (tmp_path / "questions.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        Questions(tmp_path)


def damaged(path, how: str) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "text":
        path.write_text("not a picture")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "broken chunk":
        path.write_bytes(content[:40] + b"\0" * 40 + content[80:])
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["missing", "truncated", "text", "empty", "broken chunk", "folder"])
def test_an_image_that_cannot_be_read_names_its_sample(tmp_path, how):
    folder(tmp_path, ROW, {**ROW, "id": "the second", "image": "b.png"})
    damaged(tmp_path / "b.png", how)
    data = Questions(tmp_path)
    assert data[0]["id"] == "1"
    with pytest.raises(DataError, match=r"sample 'the second': image 'b\.png' cannot be read"):
        data[1]


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match="cannot be read"):
        Questions(folder(tmp_path, ROW))[0]
