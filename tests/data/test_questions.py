"""Questions of your own: what a folder must hold, and which line or sample is named where it does not."""

from __future__ import annotations

import csv
import io
import json
import os
import sys

import pytest
from helpers.running import lines, outcomes, run
from PIL import Image

from ivtp.data.questions import DataError, Questions

ROW = {"id": "1", "image": "a.png", "question": "what is it ?", "answer": "a dog"}


def folder(tmp_path, *rows, image: bool = True):
    if image:
        Image.new("RGB", (20, 12), (200, 10, 10)).save(tmp_path / "a.png")
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    (tmp_path / "questions.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
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


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16", "I", "F"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    folder(tmp_path, {**ROW, "image": "b.tif"})
    Image.new(mode, (7, 5)).save(tmp_path / "b.tif")
    assert Questions(tmp_path)[0]["image"].mode == "RGB"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object"),
        ({"id": "2", "question": "q"}, "line 2: must have 'image' or 'images' (null for a question without an image)"),
        ({**ROW, "id": True}, "line 2: 'id' must be a text, but is True"),
        ({**ROW, "id": None}, "line 2: 'id' must be a text, but is None"),
        ({**ROW, "id": "2", "image": 7}, "line 2: 'image' must be a text, but is 7"),
        ({**ROW, "id": "2", "images": ["a.png"]}, "line 2: has 'image' and 'images'; keep one of them"),
        ({**ROW, "id": "2", "answers": ["a"]}, "line 2: has 'answer' and 'answers'; keep one of them"),
        ({"id": "2", "images": "a.png", "question": "q"}, "line 2: 'images' must be a list of texts, but is 'a.png'"),
        (
            {"id": "2", "image": None, "question": "q", "answers": [{"text": "a"}]},
            "'answers' must be a text, but is None",
        ),
        ({"id": "2", "images": ["a.png"] * 2, "question": "q", "patches": [1]}, "'patches' are those of one image"),
        ({**ROW, "id": "2", "image": "sub/../../a.png"}, "lies outside the data folder"),
        (
            '{"id": "2", "image": "a.png", "question": "\\ud800 ?"}',
            r"'question' holds half of a surrogate pair ('\ud800')",
        ),
        ('{"id": "2\\u0000", "image": "a.png", "question": "q"}', r"'id' holds a NUL character ('\x00')"),
        ('{"id": "2", "image": "a\0.png"}', "line 2: not JSON (Invalid control character"),
        ('{"id": NaN}', "line 2: not JSON (NaN is no value of JSON)"),
        ('{"id": 1e999, "image": null, "question": "q"}', "line 2: 'id' must be a text, but is inf"),
        ('{"id": ' + "9" * 5000 + "}", "line 2: not JSON (Exceeds the limit"),
        ("[" * 200_000, "line 2: not JSON that can be read (nested too deeply)"),
        (b'{"id": "\xff"}\n', "line 2: cannot be read as UTF-8 text (invalid start byte)"),
        ({**ROW, "id": "2", "question": "  "}, "sample '2' has an empty question"),
        ({**ROW, "id": "2", "image": "../a.png"}, "lies outside the data folder"),
        ({**ROW, "id": "2", "image": "/etc/passwd"}, "lies outside the data folder"),
        ({**ROW, "id": "2", "family": 3}, "'family' must be a text, but is 3"),
        ({**ROW, "id": "2", "patches": [9]}, "'patches' must be a list of patch numbers between 0 and 8"),
        ({**ROW, "id": "2", "patches": "all"}, "'patches' must be a list"),
        (ROW, "line 2: id '1' stands also in line 1; ids must be unique"),
        ({**ROW, "id": 1}, "line 2: id '1' stands also in line 1; ids must be unique"),
    ],
)
def test_the_line_that_cannot_be_used_is_named(tmp_path, row, said):
    with pytest.raises(DataError) as raised:
        Questions(folder(tmp_path, ROW, row), 9)
    assert said in str(raised.value)
    assert "questions.jsonl" in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_a_folder_without_a_table_or_with_an_empty_one(tmp_path):
    names = r"questions\.jsonl, questions\.json, questions\.csv, questions\.parquet"
    with pytest.raises(DataError, match=rf"holds none of {names}; data\.path must be a folder with one of them"):
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


# Tables in other formats -----------------------------------------------------------------------------------------------

ROWS = [
    {"id": "7", "image": "a.png", "question": "what, is\nit ?", "answer": 'a "dog"'},
    {"id": "8", "images": ["a.png", "sub/b.png"], "question": "both ?", "answers": ["yes", "no"], "family": "two"},
    {"id": "9", "image": None, "question": "no image ?", "answer": "3"},
    {"id": "10", "image": "a.png", "question": "no answer ?", "patches": [0, 3]},
]
"""Every field, written and left out."""


def write(folder, kind: str, rows=ROWS) -> None:
    """The rows as people write them."""
    names = ("id", "image", "images", "question", "answer", "answers", "family", "patches")
    if kind == "jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif kind == "jsonl of Windows":
        content = b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows)
    elif kind == "json":
        content = json.dumps(rows, indent=1).encode()
    elif kind.startswith("csv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names, lineterminator="\r\n" if "Windows" in kind else "\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
        content = text.getvalue().encode("utf-8-sig" if "Windows" in kind else "utf-8")
    else:
        import pyarrow
        from pyarrow import parquet

        columns = {name: [row.get(name) for row in rows] for name in names} | {"id": [int(row["id"]) for row in rows]}
        columns["extra"] = [b"\xff"] * len(rows)  # not read
        parquet.write_table(pyarrow.table(columns), folder / "questions.parquet")
        return
    (folder / f"questions.{kind.split()[0]}").write_bytes(content)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl of Windows", "json", "csv", "csv of Windows", "parquet"])
def test_the_same_table_in_every_format(tmp_path, kind):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (20, 12)).save(tmp_path / name)
    write(tmp_path, kind)
    data = Questions(tmp_path, 9)
    assert len(data) == 4
    one, several, none, unknown = data
    assert (one["id"], one["question"], one["answer"]) == ("7", "what, is\nit ?", 'a "dog"')
    assert "images" not in one and "answers" not in one and one["family"] == "all"
    assert [image.size for image in several["images"]] == [(20, 12)] * 2 and several["family"] == "two"
    assert several["answers"] == ["yes", "no"] and several["image_id"] == "a.png + sub/b.png"
    assert none["images"] == [] and none["image_id"] == "9" and none["answer"] == "3"
    assert unknown["answers"] == [] and unknown["patches"].nonzero().flatten().tolist() == [0, 3]


def test_two_tables_are_one_too_many(tmp_path):
    write(tmp_path, "json")
    write(tmp_path, "csv")
    with pytest.raises(DataError, match=r"holds questions\.json and questions\.csv; keep one of them"):
        Questions(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("json", b'{"questions": []}', "must be a list of objects"),
        ("json", b'[{"id": "1", "image": null, "question": "q"}, 3]', "item 2: must be an object"),
        ("json", b'[\n{"id": "1",}\n]', "not JSON (.*line 2"),
        ("csv", b"id;image;question\n1;a.png;q\n", "has no column 'id'; its columns are 'id;image;question'"),
        ("csv", b"", "has no column 'id'; its columns are none"),
        ("csv", b"id,id,question\n", "has two columns 'id'"),
        ("csv", b"id,image,question\n1,a.png\n", "line 2: has not the 3 cells of the first line"),
        ("csv", b"id,image,question\n1,a.png,q,more\n", "line 2: has not the 3 cells of the first line"),
        ("csv", b'id,image,question\n1,a.png,"q\n', "not CSV (unexpected end of data)"),
        ("csv", b"id,image,question,answers\n1,,q,red\n", "line 2, column 'answers': not JSON"),
        ("csv", b"id,question\n1,q\n", "line 2: must have 'image' or 'images'"),
        ("csv", b"id,image,question\n1,,q\n,,q\n", "line 3: 'id' must be a text, but is None"),
        ("csv", b"id,image,question\n1,,q\n2,,\xff\n", "line 3: cannot be read as UTF-8"),
        ("csv", b"id,image,question\n1,,q\0\n", "holds a NUL character"),
        ("csv", b"id,image,question\n", "holds no question"),
        ("parquet", b"PAR1 and no more", "not parquet that can be read"),
        ("jsonl", b"", "holds no question"),
    ],
)
def test_a_damaged_table_names_its_line(tmp_path, name, content, said):
    (tmp_path / f"questions.{name}").write_bytes(content)
    with pytest.raises(DataError) as raised:
        Questions(tmp_path)
    start, _, end = said.partition(".*")
    assert start in str(raised.value) and end in str(raised.value)
    assert "\n" not in str(raised.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r'needs pyarrow; pip install "ivtp\[parquet\]", or write the table as questions\.csv'
    ):
        Questions(tmp_path)


def test_a_table_that_is_no_file_is_not_opened(tmp_path):
    """Reading a FIFO would wait for ever."""
    os.mkfifo(tmp_path / "questions.jsonl")
    with pytest.raises(DataError, match=r"questions\.jsonl cannot be read \(it is a FIFO, not a file\)"):
        Questions(tmp_path)


# Images in folders ------------------------------------------------------------------------------------------------------


def test_links_of_the_user_are_followed_and_paths_out_of_the_folder_are_not(tmp_path):
    """Nobody copies COCO; but a row must not lead to other files, not even by the parent of a link."""
    root, elsewhere = tmp_path / "questions", tmp_path / "data" / "coco"
    root.mkdir()
    elsewhere.mkdir(parents=True)
    for path, shade in ((elsewhere / "a.png", 10), (tmp_path / "data" / "b.png", 20), (root / "b.png", 30)):
        Image.new("RGB", (4, 4), (shade,) * 3).save(path)
    (root / "coco").symlink_to(elsewhere)
    (root / "c.png").symlink_to(tmp_path / "data" / "b.png")
    names = ["coco/a.png", "c.png", "coco/../b.png", "./b.png", str(root / "b.png")]
    data = Questions(folder(root, *({**ROW, "id": i, "image": name} for i, name in enumerate(names)), image=False))
    assert [sample["image"].getpixel((0, 0))[0] for sample in data] == [10, 20, 30, 30, 30]
    assert [sample["image_id"] for sample in data] == ["coco/a.png", "c.png", "b.png", "b.png", "b.png"]


def test_what_is_no_image_file_is_the_sample_s_own_error(tmp_path):
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "d.png").symlink_to("d.png")
    images = {"b.png": "it is a FIFO, not a file", "d.png": "symbolic links", ".": "it is a folder, not a file"}
    data = Questions(folder(tmp_path, ROW, *({**ROW, "id": name, "image": name} for name in images)))
    for place, (name, said) in enumerate(images.items(), start=1):
        sample, _ = data.sketch(place)
        assert sample["sizes"] == [None], "a run starts all the same"
        with pytest.raises(DataError, match=rf"sample {name!r}: image {name!r} cannot be read \(.*{said}"):
            data[place]


def test_a_run_knows_images_by_their_files_without_decoding_them(tmp_path):
    data = Questions(folder(tmp_path, ROW, {**ROW, "id": "2"}), 9)
    sample, content = data.sketch(0)
    assert sample["sizes"] == [(20, 12)] and "image" not in sample
    assert content == data.sketch(1)[1]
    Image.new("RGB", (20, 12), (201, 10, 10)).save(tmp_path / "a.png")
    assert Questions(tmp_path, 9).sketch(0)[1] != content, "another image, another result"


# Answers ----------------------------------------------------------------------------------------------------------------


def answered(tmp_path, row: dict, text: str, **settings) -> dict:
    row = {"id": "1", "image": None, "question": "q"} | row
    data = Questions(folder(tmp_path, row, image=False), **settings)
    return data.scorer(data[0], text)


def test_answers_are_scored_by_the_rule_of_the_data_set(tmp_path):
    ten = {"answers": [{"answer": a, "answer_id": i} for i, a in enumerate(["two"] * 3 + ["2"] * 2 + ["three"] * 5)]}
    assert answered(tmp_path, {"answers": ["red", "blue"]}, "Blue.")["correct"] is True
    assert answered(tmp_path, ten, "2")["correct"] is True
    assert answered(tmp_path, ten, "2", answers="vqa")["correct"] == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert answered(tmp_path, ten, "2", answers="vqa", match="vqa")["correct"] is True
    assert answered(tmp_path, {"answer": 3}, "3")["correct"] is True
    assert answered(tmp_path, {"answer": "square"}, "A square", match="vqa")["correct"] is True


@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": " "}, {"answers": []}, {"answers": ["", " "]}])
def test_without_an_answer_what_the_model_says_is_not_scored(tmp_path, row):
    assert answered(tmp_path, row, "Red.") == {"answer": "", "prediction": "red", "correct": None}


def test_vqa_accuracy_of_too_few_annotators_is_refused(tmp_path):
    """It could never reach 1: a perfect model would look bad."""
    with pytest.raises(
        DataError, match=r"line 1: has 2 accepted answers, but VQA accuracy needs at least 4; use data\.answers=any"
    ):
        answered(tmp_path, {"answers": ["red", "blue"]}, "red", answers="vqa")


def test_a_run_over_several_answers_images_and_none_of_them(tmp_path, capsys):
    """The whole way: what is not known is blank in record and table, and the rule is part of the record."""
    write(folder(tmp_path), "json", [{**row, "images": ["a.png"] * 2} if "images" in row else row for row in ROWS])
    (tmp_path / "questions.jsonl").unlink()
    asked = ("pruner=topk", "budget.keep=17", "data=folder", f"data.path={tmp_path}", "data.max_new_tokens=2")
    assert run(*asked, "data.match=contains", output=tmp_path / "out") == 0
    _, record = lines(tmp_path / "out" / "run" / "results.jsonl")
    assert (record["data"]["match"], record["data"]["answers"]) == ("contains", "any")
    assert record["metrics"]["accuracy"]["n"] == 3
    found = {outcome["id"]: outcome for outcome in outcomes(tmp_path / "out" / "run", record)}
    assert found["8"]["answer"] == "yes | no" and len(found["8"]["kept"]) == 34
    assert found["9"]["kept"] is None, "as without the others in its batch"
    assert found["10"]["correct"] is None and found["10"]["prediction"]
    (tmp_path / "questions.json").write_text(json.dumps([ROWS[3]]))
    capsys.readouterr()
    assert run(*asked, output=tmp_path / "blank") == 0
    assert "topk: not scored, " in capsys.readouterr().out
    table = [
        [cell.strip() for cell in line.split("|")]
        for line in (tmp_path / "blank/run/table.md").read_text().splitlines()
    ]
    (heads,), (row,) = ([line for line in table if name in line] for name in ("accuracy", "topk"))
    assert [row[heads.index(name)] for name in ("accuracy", "− unpruned", "early accuracy")] == ["–"] * 3
