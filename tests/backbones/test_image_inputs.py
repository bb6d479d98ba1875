"""Images made square by padding or cropping, and cut into fewer crops: what the model reads, and where its patches lie."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from conftest import close
from helpers.families import TEXTS, family, llava_1_5, llava_next, llava_onevision, photo
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    LlavaImageProcessor,
    LlavaImageProcessorPil,
    SiglipImageProcessor,
)

import ivtp
from ivtp.backbones import ModelError
from ivtp.backbones.loading.image_inputs import padded, padding_of, patch_boxes, visible_box
from ivtp.backbones.text.pairing import crop_limit_of
from ivtp.report.viewer import as_seen
from ivtp.results import Result

BACKENDS = {CLIPImageProcessor: LlavaImageProcessor, CLIPImageProcessorPil: LlavaImageProcessorPil}
ODD = [(90, 30), (31, 97), (35, 36), (33, 33), (1, 7), (640, 480)]
"""Widths and heights."""


def clip(backend=CLIPImageProcessor, side: int = 35, **settings):
    return backend(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **settings)


def pixels(processor, image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"]


def squared(image: Image.Image, mean) -> Image.Image:
    """LLaVA's own padding: the picture in the middle of a square of the mean colour."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@pytest.mark.parametrize("size", ODD, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda kind: kind.__name__)
def test_padding_is_that_of_llava_to_the_bit(backend, size):
    """Another colour, or half a pixel, is another image than the model was trained on."""
    image = photo(size[1], size[0])
    for settings in ({}, {"image_mean": [0.3, 0.55, 0.71], "image_std": [0.2, 0.3, 0.4], "resample": 2}):
        own = clip(backend, **settings)
        pad = padded(own, "pad")
        assert type(pad) is BACKENDS[backend] and padding_of(pad) == "pad"
        assert torch.equal(pixels(pad, image), pixels(own, squared(image, own.image_mean)))
        crop = padded(pad, "crop")
        assert padding_of(crop) == "crop" and torch.equal(pixels(crop, image), pixels(own, image))
    assert padded(own, "crop") is own


def test_what_has_no_square_to_cut_is_refused():
    with pytest.raises(
        ModelError, match=r"image_padding='pad' is for processors that crop .* has a SiglipImageProcessor"
    ):
        padded(SiglipImageProcessor(), "pad")
    with pytest.raises(ModelError, match="image_padding='square' is not one of pad, crop"):
        ivtp.load_model("tiny", image_padding="square")
    with pytest.raises(ModelError, match="image_padding='pad' needs the model's processor"):
        ivtp.load_model(llava_1_5()[0], image_padding="pad")


def test_load_model_pads_where_it_is_told_to_and_says_where_it_crops(tmp_path):
    """The hub's processor of LLaVA-1.5 crops; whoever loads it without a word must hear of it."""
    model, processor, _ = llava_1_5()
    processor.chat_template = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="crops images at the centre, while LLaVA-1.5 was trained on padded ones"):
        _, silent = ivtp.load_model(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, pad = ivtp.load_model(tmp_path, image_padding="pad")
        _, crop = ivtp.load_model(tmp_path, image_padding="crop")
        _, tiny = ivtp.load_model("tiny")
        given = ivtp.load_model(model, processor)[1]
    assert [padding_of(p.image_processor) for p in (silent, pad, crop, tiny, given)] == [
        "crop", "pad", "crop", "crop", "crop",
    ]  # fmt: skip
    image = photo(30, 90)
    prompt = {"text": "<image> what ?", "return_tensors": "pt"}
    assert torch.equal(pad(images=image, **prompt)["pixel_values"], pixels(padded(clip(), "pad"), image))
    assert torch.equal(silent(images=image, **prompt)["pixel_values"], pixels(clip(), image))


# Where patches lie --------------------------------------------------------------------------------------------------


def marked(size: tuple[int, int], box) -> Image.Image:
    """A black picture that is white where the box lies in it."""
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    left, top, right, bottom = (max(0, round(edge)) for edge in box)
    picture[top:bottom, left:right] = 255
    return Image.fromarray(picture)


@pytest.mark.parametrize("size", [(900, 300), (300, 900), (641, 480), (700, 700)], ids=str)
@pytest.mark.parametrize("way", ["pad", "crop", "squash", "resize"])
def test_a_patch_shows_the_part_of_the_picture_that_it_is_said_to(way, size):
    """Mark that part alone: the patch is white in what the model reads, and all others are dark. Overlays draw there."""
    side, grid = 140, 5
    processor = SiglipImageProcessor(size={"height": side, "width": side}) if way == "resize" else clip(side=side)
    if way == "pad":
        processor = padded(processor, way)
    if way == "squash":  # to another aspect, then cropped
        processor.size = {"height": 2 * side, "width": side}
    boxes = patch_boxes(processor, size, grid**2)
    whole = visible_box(processor, size)
    assert (boxes[0][:2], boxes[-1][2:]) == (whole[:2], pytest.approx(whole[2:]))
    seen = 0
    for patch, (left, top, right, bottom) in enumerate(boxes):
        if left < 0 or top < 0 or right > size[0] or bottom > size[1]:
            continue  # padding, or a patch that is part picture and part padding
        seen += 1
        view = np.asarray(as_seen(processor, marked(size, (left, top, right, bottom)))).astype(float) / 255
        cells = view.reshape(grid, side // grid, grid, side // grid, 3).transpose(0, 2, 1, 3, 4).reshape(grid**2, -1)
        mean = cells.mean(1)
        mean[patch] -= 1
        background = as_seen(processor, marked(size, (0, 0, 0, 0)))
        empty = np.asarray(background).astype(float).reshape(grid, side // grid, grid, side // grid, 3) / 255
        mean -= np.where(np.arange(grid**2) == patch, 0, empty.transpose(0, 2, 1, 3, 4).reshape(grid**2, -1).mean(1))
        assert np.abs(mean).max() < 0.06
    # Of a padded picture of 3 : 1 one row (or column) of five is picture and nothing else; of one of 4 : 3 three are.
    assert seen == (25 if way != "pad" else {900: 5, 641: 15, 700: 25}[max(size)])


def test_an_image_that_is_not_square_is_drawn_as_the_model_reads_it(tmp_path, monkeypatch):
    """kept_tokens.png stretched the whole picture under a grid that lies on its middle alone."""
    from ivtp.report import plots as figures

    drawn = []
    monkeypatch.setattr(figures, "overlay", lambda image, *_: (drawn.append(image), image)[1])
    image, processor = photo(30, 90), clip()
    data = [{"id": "a", "image": image, "question": "what ?", "patches": torch.zeros(25, dtype=torch.bool)}]
    rows = [Result(label="x", tokens=[25, 3])]
    outcomes = {"x": [{"id": "a", "kept": [0, 7], "correct": True, "prediction": "y"}]}
    for own in (processor, padded(processor, "pad")):
        assert figures.kept_tokens(rows, outcomes, data, own, tmp_path / "kept.png")
        assert np.array_equal(drawn.pop(), np.asarray(as_seen(own, image)))


# Fewer crops --------------------------------------------------------------------------------------------------------


def test_crops_are_limited_in_model_and_processor_and_small_images_stay_as_they_are():
    """Grids of at most so many crops; an image that had no more gets the same pixels and the same logits as before."""
    for make, most in ((llava_next, 2), (llava_onevision, 3)):
        model, processor, token = make()
        small, large = photo(35, 70), photo(140, 140)

        def inputs(image, processor=processor, token=token):
            return dict(processor(images=[image], text=[token + TEXTS[0]], return_tensors="pt"))

        before, wide = model(**inputs(small)).logits, inputs(large)
        ivtp.load_model(model, processor, max_crops=most)
        grids = model.config.image_grid_pinpoints
        assert processor.image_processor.image_grid_pinpoints == grids == model.model.config.image_grid_pinpoints
        assert max(height * width for height, width in grids) // 35**2 == most
        assert torch.equal(model(**inputs(small)).logits, before)
        assert wide["pixel_values"].shape[1] == 5 and inputs(large)["pixel_values"].shape[1] <= most + 1
        model(**inputs(large))  # as many features as placeholders
        limit = crop_limit_of(model)
        assert [limit.affected([image.size]) for image in (small, large)] == [0, 1]
        several = limit.affected([large.size, small.size, large.size])
        assert several == (2 if make is llava_next else 0)  # OneVision does not cut several images at all


def test_with_few_enough_crops_no_image_is_blended_and_every_tower_pruner_works():
    """OneVision interpolates the features of large images behind the tower: there is no such image any more."""
    model, processor, token = llava_onevision(limit=1)
    large = photo(70, 70)
    prompt = {"images": [large], "text": [token + TEXTS[0]], "return_tensors": "pt"}

    def refusal() -> str:
        with pytest.raises(ValueError) as error, ivtp.prune(model, "topk", keep=11):
            model(**processor(**prompt))
        assert "image of 70 × 70 pixels" in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "max_crops" not in refusal()  # every grid has more than one crop
    grids = [*model.config.image_grid_pinpoints, [35, 35]]
    model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = grids
    assert "max_crops=1 of ivtp.load_model, model.max_crops=1" in refusal()
    ivtp.load_model(model, processor, max_crops=1)
    inputs = dict(processor(**prompt))
    expected = model(**inputs).logits
    for name, settings in {"none": {}, "topk": {"keep": 12}, "tome": {"keep": 30}, "fastv": {"keep": 11}}.items():
        with ivtp.prune(model, name, **settings) as run:
            logits = model(**inputs).logits
        assert torch.isfinite(logits).all() and run.trace.visual.tolist() == [50]
        if name == "none":
            close(logits[:, -1], expected[:, -1])
        else:
            assert int(run.trace.kept.valid.sum()) == settings["keep"]


def test_the_limit_is_the_one_of_the_last_call():
    """A second call on the same model takes the grids of the checkpoint, not those that the first one left."""
    model, processor, _ = llava_next()
    own = [list(grid) for grid in model.config.image_grid_pinpoints]

    def grids_of(*given, **settings):
        ivtp.load_model(model, *given, **settings)
        grids = model.config.image_grid_pinpoints
        assert grids == processor.image_processor.image_grid_pinpoints
        return max(height * width // 35**2 for height, width in grids), getattr(crop_limit_of(model), "crops", None)

    assert [grids_of(processor, max_crops=most) for most in (2, 3, 2)] == [(2, 2), (3, 3), (2, 2)]
    for wrong in (1, 0, "3"):  # what is refused changes nothing
        with pytest.raises(ModelError, match="max_crops"):
            ivtp.load_model(model, processor, max_crops=wrong)
    for most in (None, 3):  # the processor would keep its two crops
        with pytest.raises(ModelError, match=f"max_crops={most or 2} needs the model's processor"):
            ivtp.load_model(model, None, max_crops=most)
    assert max(map(tuple, model.config.image_grid_pinpoints)) == (70, 35) and crop_limit_of(model).crops == 2
    assert grids_of(processor) == (max(height * width for height, width in own) // 35**2, None)
    assert model.config.image_grid_pinpoints == own
    grids_of(processor, max_crops=2)
    model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = own[1:]  # by hand
    ivtp.load_model(model, processor)
    assert model.config.image_grid_pinpoints == own[1:]


@pytest.mark.parametrize("crops", ["3", 2.0, True, 0, -1])
def test_a_limit_is_a_whole_number(crops):
    model, processor, _ = llava_next()
    with pytest.raises(ModelError, match=f"max_crops={crops!r} must be a whole number of at least 1, or None"):
        ivtp.load_model(model, processor, max_crops=crops)


def test_a_limit_that_cannot_be_is_refused():
    model, processor, _ = llava_next()
    with pytest.raises(ModelError, match="max_crops=1: the smallest grid of this model has 2 crops; give at least 2"):
        ivtp.load_model(model, processor, max_crops=1)
    with pytest.raises(
        ModelError, match=r"max_crops=9 restricts the grids .* which a 'qwen2_5_vl' model does not have"
    ):
        ivtp.load_model(*family("qwen2_5_vl")[:2], max_crops=9)


def test_the_shape_for_cost_has_the_same_limit():
    """A budget is worked out for the crops that the model will see."""
    from omegaconf import OmegaConf

    from ivtp.experiment.config import load_config
    from ivtp.experiment.planning import build_shape

    config = load_config(["model=llava_onevision_7b", "model.image=[1920,1920]"])
    OmegaConf.set_struct(config, False)
    assert build_shape(config).crops == 10
    config.model.max_crops = None
    assert build_shape(config).crops == 26
