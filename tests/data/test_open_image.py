"""Images as people have them become the RGB that a viewer would show, or are refused with the reason."""

from __future__ import annotations

import os
import socket
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ivtp import load_model
from ivtp.data.images import hub_images, image_folder
from ivtp.data.open_image import MAX_ASPECT, ImageError, image_size, open_image, to_rgb
from ivtp.data.questions import DataError
from ivtp.lmms.dataset import request_fields

RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
"""Every grey of 8 bits once, in 16 bits."""
GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", RAMP),
        ("a.tif", RAMP),
        ("big-endian.tif", RAMP.astype(">u2")),
        ("32.tif", RAMP.astype(np.int32)),
        ("small.tif", GREYS.astype(np.int32)),
        ("wide range.tif", RAMP.astype(np.int32) * 3),
        ("negative.tif", RAMP.astype(np.int32) - 40_000),
        ("unit.tif", RAMP.astype(np.float32) / 65535),
        ("byte.tif", GREYS.astype(np.float32)),
        ("deep.tif", RAMP.astype(np.float32)),
        ("any.tif", RAMP.astype(np.float32) * 1e6 - 7),
    ],
)
def test_deep_images_are_scaled_and_not_clipped(tmp_path, name, values):
    """Pillow's own conversion turns all of these but the bytes white or black."""
    Image.fromarray(values).save(tmp_path / name)
    assert np.abs(grey(open_image(tmp_path / name)).astype(int) - GREYS).max() <= 1


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    """Its own range must not be stretched: pixels mean the same in every image."""
    Image.fromarray(RAMP // 100).save(tmp_path / "a.png")
    assert grey(open_image(tmp_path / "a.png")).max() == 3


def test_a_pgm_of_16_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())
    assert np.abs(grey(open_image(tmp_path / "a.pgm")).astype(int) - GREYS).max() <= 1


def test_pixels_without_a_value_are_black_and_an_image_of_them_is_refused(tmp_path):
    """As depth maps and satellite images have them."""
    values = RAMP.astype(np.float32) / 65535
    values[0, 3:6] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert grey(open_image(tmp_path / "a.tif"))[0, 3:6].tolist() == [0, 255, 0]
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(ImageError, match="no finite pixel value"):
        open_image(tmp_path / "b.tif")
    Image.fromarray(np.full((4, 4), -7.0, np.float32)).save(tmp_path / "c.tif")
    assert grey(open_image(tmp_path / "c.tif")).max() == 0


def transparent(mode: str) -> Image.Image:
    """The left half opaque, the right one transparent over a hidden colour."""
    image = Image.new("RGBA", (8, 4), (255, 255, 0, 255) if mode in ("RGBA", "P") else (60, 60, 60, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 4))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white_and_not_the_colour_below(tmp_path, mode):
    transparent(mode).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    assert image.getpixel((6, 1)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == ((255, 255, 0) if mode != "LA" else (60, 60, 60))


def test_half_transparent_colours_are_mixed_and_opaque_ones_are_themselves(tmp_path):
    Image.new("RGBA", (3, 3), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (127, 127, 127)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), pixels[..., :3])


def test_a_colour_that_a_png_declares_transparent(tmp_path):
    """Without an alpha channel: the tRNS chunk, in RGB, grey, black and white."""
    for mode, hidden in (("RGB", (9, 9, 9)), ("L", 9), ("1", 0)):
        Image.new(mode, (4, 4), hidden).save(tmp_path / "a.png", transparency=hidden)
        assert open_image(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)


def test_print_colours_and_palettes(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    Image.new("RGB", (4, 4), (255, 0, 0)).quantize(4).save(tmp_path / "a.png")
    for name in ("a.tif", "a.jpg", "a.png"):
        red, green, blue = open_image(tmp_path / name).getpixel((1, 1))
        assert red > 250 and green < 5 and blue < 5


ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation → how an upright image was turned to be stored."""


def turned(path, upright: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(ORIENTATIONS[orientation]).save(
        path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {})
    )


@pytest.mark.parametrize("orientation", list(ORIENTATIONS))
@pytest.mark.parametrize("kind", ["png", "webp", "tif"])
def test_photographs_stand_upright(tmp_path, orientation, kind):
    upright = Image.fromarray(np.random.default_rng(orientation).integers(0, 256, (5, 11, 3), np.uint8))
    path = tmp_path / f"a.{kind}"
    turned(path, upright, orientation)
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(upright))
    assert image_size(path) == (11, 5)
    assert not open_image(path).getexif().get(0x0112), "nothing that reads it later must turn it again"


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0rubbish.", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_damaged_metadata_is_no_damaged_image(tmp_path, exif, kind):
    Image.new("RGB", (7, 4), (200, 200, 200)).save(tmp_path / f"a.{kind}", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / f"a.{kind}").size == (7, 4)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    red, green, blue = open_image(tmp_path / f"a.{kind}").getpixel((3, 3))
    assert red > 200 > 50 > max(green, blue)


def test_one_pixel_is_an_image_and_a_line_is_not(tmp_path):
    Image.new("RGB", (1, 1), (3, 4, 5)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (3, 4, 5)
    for size in ((MAX_ASPECT, 1), (1, MAX_ASPECT)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        assert open_image(tmp_path / "a.png").size == size
    Image.new("RGB", (5000, 1)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"it is 5000 × 1 pixels, and no side may be more than 200 times the other"):
        open_image(tmp_path / "a.png")


def test_a_hundred_megapixels_are_read_in_silence_and_twice_as_many_refused(tmp_path):
    Image.new("1", (10_007, 9_973), 1).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png").size == (10_007, 9_973)
    Image.new("1", (14_000, 13_001)).save(tmp_path / "b.png")
    with pytest.raises(ImageError, match="exceeds limit of 178956970 pixels"):
        open_image(tmp_path / "b.png")
    assert image_size(tmp_path / "b.png") is None


def special(path, kind: str):
    """A path that is no file; what must stay open for the test."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        return server
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    return None


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_what_is_no_file_is_never_opened(tmp_path, kind, monkeypatch):
    """Opening a FIFO waits for a writer for ever; /dev/zero never ends."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    held = special(tmp_path / "a.png", kind) if kind != "socket" else special(type(tmp_path)("a.png"), kind)
    said = []

    def reading():
        with pytest.raises(ImageError) as raised:
            open_image(tmp_path / "a.png")
        said.append(str(raised.value))
        assert image_size(tmp_path / "a.png") is None

    thread = threading.Thread(target=reading, daemon=True)
    thread.start()
    thread.join(20)
    assert said == [f"it is a {kind}, not a file"]
    if held:
        held.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot identify image file"),
        (b"not a picture", "cannot identify image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "cannot identify image file"),
        (None, "No such file or directory"),
    ],
)
def test_what_is_no_image_says_so(tmp_path, content, said):
    """PostScript least of all: Pillow would have Ghostscript run it."""
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=said) as raised:
        open_image(tmp_path / "a.png")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "tif", "bmp"])
def test_a_file_that_ends_early_is_refused(tmp_path, kind, monkeypatch):
    """Also where another library has asked Pillow to fill up with grey, as lmms-eval does when it is imported."""
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / f"a.{kind}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError):
        open_image(path)


def test_an_image_is_turned_once():
    image = Image.new("RGB", (7, 3))
    image.getexif()[0x0112] = 6
    assert to_rgb(image).size == to_rgb(to_rgb(image)).size == (3, 7)


# The same rule wherever images are read ------------------------------------------------------------------------------


def test_a_folder_of_classes_and_a_data_set_of_the_hub_follow_the_rule(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as Images

    upright = Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 11, 3), np.uint8))
    for name in "ab":
        (tmp_path / "classes" / name).mkdir(parents=True)
    turned(tmp_path / "classes" / "a" / "0.png", upright, 6)
    Image.fromarray(RAMP).save(tmp_path / "classes" / "a" / "1.png")
    Image.new("RGBA", (4, 4)).save(tmp_path / "classes" / "b" / "2.png")
    os.mkfifo(tmp_path / "classes" / "b" / "3.png")
    (tmp_path / "classes" / "b" / "4.png").symlink_to("nowhere")
    files = sorted((tmp_path / "classes").rglob("[012].png"))
    columns = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": ["a", "a", "b"]}
    found = Dataset.from_dict(columns, features=Features({"image": Images(), "label": Value("string")}))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    found.to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    folder = image_folder(tmp_path / "classes", 4)
    for data in (folder, hub_images(str(tmp_path / "hub"), 4)):
        assert np.array_equal(np.asarray(data[0]["image"]), np.asarray(upright))
        assert np.abs(grey(data[1]["image"]).astype(int) - GREYS).max() <= 1
        assert data[2]["image"].getpixel((0, 0)) == (255, 255, 255)
    for place, said in ((3, "it is a FIFO"), (4, "No such file")):
        folder.sketch(place)
        with pytest.raises(DataError, match=rf"image 'b/{place}\.png' cannot be read \({said}"):
            folder[place]


def test_lmms_tasks_show_images_as_lmms_eval_does_but_deep_ones_scaled():
    (seen,) = request_fields([Image.fromarray(RAMP)], "what ?", chat=False)["images"]
    assert np.abs(grey(seen).astype(int) - GREYS).max() <= 1
    hidden = Image.new("RGBA", (4, 4), (9, 8, 7, 0))
    (seen,) = request_fields([hidden], "what ?", chat=False)["images"]
    assert seen.getpixel((0, 0)) == (9, 8, 7)


def test_the_page_shows_the_image_that_the_model_saw(tmp_path):
    """A photograph that is stored on its side must not lie on its side below the kept patches."""
    from ivtp import results as records
    from ivtp.data.questions import Questions
    from ivtp.report import viewer

    processor = load_model("tiny")[1]
    upright = Image.new("RGB", (144, 144), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 72, 144, 144))  # blue below
    turned(tmp_path / "a.png", upright, 6)
    (tmp_path / "questions.jsonl").write_text('{"id": "1", "image": "a.png", "question": "what ?"}')
    viewer.save(tmp_path / "out", Questions(tmp_path, 324), processor, 1)
    ((row,), _) = records.read(tmp_path / "out" / "viewer" / "samples.jsonl")
    with Image.open(tmp_path / "out" / "viewer" / row["picture"]) as page:
        page = torch.tensor(np.asarray(page.convert("RGB"))).int()
    assert (page[:64] - torch.tensor([255, 0, 0])).abs().max() < 20
    assert (page[80:] - torch.tensor([0, 0, 255])).abs().max() < 20
