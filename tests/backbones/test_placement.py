"""Weights go straight to their device, and images of one's own size are limited."""

from __future__ import annotations

import pytest
import torch
from helpers.families import batch, family, photo
from torch import nn
from transformers import AutoModelForImageTextToText, CLIPTextModelWithProjection

import ivtp
from ivtp.backbones.family import ModelError
from ivtp.backbones.loading.hub import EMBEDDED, straight_to
from ivtp.backbones.text.loading import load_text_encoder


@pytest.mark.parametrize("kind", [AutoModelForImageTextToText, CLIPTextModelWithProjection])
def test_weights_are_read_to_a_gpu_and_not_by_way_of_the_main_memory(kind, monkeypatch):
    """A machine with less memory than its GPU can load the model, and it takes half the time."""
    given, load = {}, kind.from_pretrained

    def from_pretrained(*arguments, device_map=None, **settings):
        given.update(device_map=device_map)
        return load(*arguments, **settings)

    def moved(*_):
        raise AssertionError("weights were moved")

    monkeypatch.setattr("ivtp.api.check_device", lambda _: None)
    monkeypatch.setattr("ivtp.backbones.text.loading.read_tensors", lambda files, wanted, device: {
        "visual_projection.weight": torch.zeros(3, 4) if device == "cuda:1" else None})  # fmt: skip
    monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    monkeypatch.setattr(nn.Module, "to", moved)
    if kind is AutoModelForImageTextToText:
        ivtp.load_model("tiny", device="cuda:1")
    else:
        load_text_encoder(str(EMBEDDED["tiny"] / "clip"), "cuda:1")
    assert given == {"device_map": {"": torch.device("cuda", 1)}}
    assert straight_to("cpu") == straight_to(torch.device("meta")) == {}


def test_a_device_map_of_one_device_changes_no_weight():
    one, other = ivtp.load_model("tiny")[0], ivtp.load_model("tiny", device_map={"": "cpu"})[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_images_of_their_own_size_are_limited():
    """Tokens of a large photograph are those of a smaller one; small images stay as they are."""
    model, processor, image = family("qwen2_5_vl")
    before = dict(processor.image_processor.size)
    try:
        ivtp.load_model(model, processor, max_pixels=70 * 70)
        large, small = (
            processor(images=[photo(*s)], text=[image], return_tensors="pt") for s in ((210, 140), (56, 56))
        )
        step = processor.image_processor.patch_size
        rows, columns = large["image_grid_thw"][0, 1:].tolist()
        assert rows * columns * step**2 <= 70 * 70 and small["image_grid_thw"].tolist() == [[1, 8, 8]]
        with pytest.raises(ModelError, match=r"max_pixels=100 must be a whole number of at least 196"):
            ivtp.load_model(model, processor, max_pixels=100)
    finally:
        processor.image_processor.size = before
    with pytest.raises(ModelError, match=r"max_pixels=9999 is for models that read images at their own size .*'llava'"):
        ivtp.load_model("tiny", max_pixels=9999)
    assert batch("qwen2_5_vl")["image_grid_thw"].shape == (3, 3)
