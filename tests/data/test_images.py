"""Labelled images: folders, data sets in the hub's format, emoji."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from ivtp.data.images import ImageCollate, emoji, hub_images, image_folder
from ivtp.data.questions import DataError


def picture(shade: int, size=(23, 17)):
    return Image.fromarray(np.full((*size[::-1], 3), shade, np.uint8))


def folder(path, **classes: int):
    """One folder per class with so many images."""
    for number, (name, count) in enumerate(classes.items()):
        (path / name).mkdir(parents=True)
        for i in range(count):
            picture(10 * number + i).save(path / name / f"{i}.png")
    return path


def test_a_folder_of_a_folder_per_class(tmp_path):
    data = image_folder(folder(tmp_path, tabby_cat=2, dog=3), 9)
    assert data.classes == ["dog", "tabby cat"] and len(data) == 5
    sample = data[3]
    assert (sample["id"], sample["answer"], sample["label"]) == ("tabby_cat/0.png", "tabby cat", 1)
    assert sample["image"].getpixel((0, 0)) == (0, 0, 0) and not sample["patches"].any() and len(sample["patches"]) == 9


def test_wordnet_names_become_words_in_imagenet_s_order(tmp_path):
    """Zero-shot classification reads them; a classifier counts them."""
    data = image_folder(folder(tmp_path, n01440764=1, n01443537=1), 4)
    assert data.classes == ["tench", "goldfish"]


def test_what_a_run_knows_of_an_image_without_opening_it_changes_with_its_file(tmp_path):
    """A data set of many thousand images is not decoded before the first one runs; its hash still tells it apart."""
    data = image_folder(folder(tmp_path, a=1, b=1), 4)
    sample, before = data.sketch(1)
    assert "image" not in sample and sample["answer"] == "b"
    picture(3, (99, 98)).save(tmp_path / "b" / "0.png")
    assert data.sketch(1)[1] != before


def test_a_folder_that_is_none_is_named(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="one folder of images for each class"):
            image_folder(path, 4)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    folder(tmp_path, a=2)
    (tmp_path / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    data = image_folder(tmp_path, 4)
    data[0]
    with pytest.raises(DataError, match=r"'a/1.png' cannot be read"):
        data[1]


def test_an_error_of_the_program_is_not_taken_for_a_damaged_image(monkeypatch):
    def sprite(*_):
        return {}["drawing"]

    monkeypatch.setattr("ivtp.data.scenes2.assets.sprite", sprite)
    data = emoji(4, ["twemoji"])
    with pytest.raises(KeyError, match="drawing"):
        data[0]


def parquet(path, label, kind: dict | None = None, damaged: bool = False):
    """A split of a data set as the hub stores it: bytes of images, and the features in the schema's metadata."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as Images

    def content(shade):
        out = io.BytesIO()
        picture(shade).save(out, "PNG")
        return {"bytes": out.getvalue()[: 20 if damaged else None], "path": None}

    feature = ClassLabel(names=kind["names"]) if kind else Value("string" if isinstance(label[0], str) else "int64")
    columns = {"image": [content(i) for i in range(len(label))], "label": label}
    found = Dataset.from_dict(columns, features=Features({"image": Images(), "label": feature}))
    (path / "data").mkdir(parents=True)
    found.to_parquet(path / "data" / "test-00000-of-00001.parquet")
    return str(path)


def test_a_folder_of_parquet_files_with_the_label_s_own_names(tmp_path):
    data = hub_images(parquet(tmp_path, [1, 0, 1], {"names": ["cat", "fire_truck"]}), 4)
    assert data.classes == ["cat", "fire truck"]
    assert [data[i]["answer"] for i in range(3)] == ["fire truck", "cat", "fire truck"]
    assert data[2]["image"].getpixel((0, 0)) == (2, 2, 2) and data[2]["image"].mode == "RGB"


def test_an_image_of_a_parquet_file_that_cannot_be_decoded_is_named(tmp_path):
    data = hub_images(parquet(tmp_path, ["a"], damaged=True), 4)
    with pytest.raises(DataError, match=r"image '0' cannot be read .*; mend or remove it"):
        data[0]


def test_labels_without_names_are_named_by_their_values(tmp_path):
    data = hub_images(parquet(tmp_path, ["b", "a", "b"]), 4)
    assert data.classes == ["a", "b"] and [data[i]["label"] for i in range(3)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"split": "validation"}, "split 'validation', cannot be loaded"),
        ({"image": "picture"}, "data.image=picture is no column"),
        ({"label": "class"}, "data.label=class is no column"),
    ],
)
def test_what_a_data_set_does_not_have_is_named(tmp_path, given, says):
    with pytest.raises(DataError, match=says) as raised:
        hub_images(parquet(tmp_path, ["b", "a"]), 4, **given)
    assert "\n" not in str(raised.value)


def test_images_without_a_label_are_refused(tmp_path):
    """As in the test splits of many data sets, which hide it as -1."""
    with pytest.raises(DataError, match="without a label"):
        hub_images(parquet(tmp_path, [-1, -1], {"names": ["a"]}), 4)


def test_a_data_set_that_is_not_there_says_what_to_do_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="offline, give a folder of parquet files"):
        hub_images("nobody/nothing", 4)


def test_a_batch_is_what_the_model_s_own_transform_makes_of_each_image():
    class Processor:
        @staticmethod
        def image_processor(images, return_tensors):
            return {"pixel_values": torch.stack([torch.tensor(np.asarray(image)).float() for image in images])}

    data = emoji(324, ["noto"], 6)
    batch = ImageCollate(Processor())([data[3], data[1]])
    assert batch.inputs["pixel_values"].shape == (2, 124, 124, 3)
    assert [sample["id"] for sample in batch.samples] == [data.ids[3], data.ids[1]]


def test_folders_that_only_look_like_wordnet_names_are_words(tmp_path):
    assert image_folder(folder(tmp_path, n1=1, n2=1), 4).classes == ["n1", "n2"]


@pytest.mark.parametrize(
    ("names", "said"), [(("a_b", "a b"), "one class name, 'a b'"), (("n99999999",), "has the form of a WordNet name")]
)
def test_class_names_that_cannot_be_told_apart_or_are_not_known_are_refused(tmp_path, names, said):
    with pytest.raises(DataError, match=said):
        image_folder(folder(tmp_path, **dict.fromkeys(names, 1)), 4)


def test_an_image_that_is_written_again_is_another_one(tmp_path):
    """Also where its size in bytes stays the same: results of the old one are not taken for its."""
    data = image_folder(folder(tmp_path, one=1), 4)
    before = data.sketch(0)[1]
    os.utime(tmp_path / "one" / "0.png", ns=(0, 1))
    assert data.sketch(0)[1] != before


def test_emoji_are_one_thing_in_several_styles():
    """Classes are the same whatever the styles, so that a gallery in one style is for images in another; the drawing
    stands in the middle on white, and its patches are known."""
    ones, others = emoji(256, ["noto"]), emoji(256, ["fluent-3d", "twemoji"])
    assert ones.classes == others.classes and len(ones.classes) > 400
    assert len(set(ones.ids)) == len(ones) and {s["label"] for s in map(ones._text, range(len(ones)))} == set(
        range(443)
    )
    assert len(emoji(256, ["noto-v1", "fluent-flat", "fluent-3d", "emojione", "twemoji"])) >= 2000
    for place in (0, 100):
        sample = others[place]
        pixels = np.asarray(sample["image"].resize((256, 256)))
        inked = (pixels < 240).any(2).reshape(16, 16, 16, 16).mean((1, 3)) > 0.5
        assert (inked == sample["patches"].view(16, 16).numpy()).mean() > 0.9
        rows, columns = np.nonzero((np.asarray(sample["image"]) < 250).any(2))
        side = sample["image"].width
        longest = max(np.ptp(rows), np.ptp(columns)) + 1
        assert sample["image"].height == side and longest / side == pytest.approx(8 / 12, abs=0.05)
    assert not emoji(255, ["noto"])[0]["patches"].any() and not emoji(256, ["noto"], whole=False)[0]["patches"].any()
    assert emoji(256, ["noto"], size=12)[0]["patches"].sum() > ones[0]["patches"].sum()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"styles": ["apple"]}, "data.styles=.*apple.*noto, noto-v1"),
        ({"styles": "noto"}, "must be a list of styles"),
        ({"styles": []}, "must be a list of styles"),
        ({"styles": ["noto"], "size": 13}, "data.size=13 must be between 1 and 12"),
    ],
)
def test_emoji_that_there_are_not(asked, says):
    with pytest.raises(DataError, match=says):
        emoji(256, **asked)
