"""Encoders and labelled images from a config."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ivtp.backbones import shape_of
from ivtp.backbones.loading.encoders import TEMPLATES, Encoder, encoder_shape, load_encoder
from ivtp.core.flops import Shape
from ivtp.data.datamodule import QuestionData
from ivtp.data.images import ImageCollate, Images, emoji, hub_images, image_folder
from ivtp.registry import UserError

SOURCES = ("emoji", "imagefolder", "hub_images")


def build_encoder(config: DictConfig, device: str) -> Encoder:
    """Load the encoder of `config.model`."""
    c = config.model
    settings = {name: c[name] for name in ("pretrained", "attn_implementation") if name in c}
    return load_encoder(c.library, c.source, revision=c.revision, dtype=c.dtype, device=device, **settings)


def build_encoder_shape(config: DictConfig) -> Shape:
    """Sizes of the encoder of `config.model`, without its weights where they are known."""
    from transformers import AutoConfig

    c = config.model
    if c.get("config"):
        sizes: Any = OmegaConf.to_container(c.config)
        return shape_of(AutoConfig.for_model(**sizes))
    return encoder_shape(c.library, c.get("architecture") or c.source, c.revision)


def templates_of(config: DictConfig) -> tuple[str, ...]:
    """Templates that class names are put into; raises UserError for one without a place for the name."""
    templates = tuple(config.model.get("templates") or TEMPLATES)
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise UserError(f"template {template!r} of model.templates must be a text with {{}}, the class name, once")
    return templates


def build_images(config: DictConfig, encoder: Encoder, shape: Shape, batch_size: int) -> QuestionData:
    """Make the data module of `config.data`, and teach the encoder its classes."""
    neighbours = config.model.get("neighbours") or 0
    data = labelled_images(config.data, shape, encoder.whole)
    if neighbours:
        if not config.data.get("gallery"):
            raise UserError(
                f"model.neighbours={neighbours} vote, but data.gallery has none; give labelled images there"
            )
        gallery = labelled_images(config.data, shape, encoder.whole, gallery=True)
        if gallery.classes != data.classes:
            raise UserError(
                f"data.gallery={config.data.gallery} has other classes than the data: give it the same ones"
            )
        features, labels = encode(encoder, gallery, batch_size)
        encoder.by_neighbours(neighbours, features, labels, len(data.classes))
    elif encoder.text_features is not None:
        encoder.by_names(data.classes, templates_of(config))
    else:
        encoder.by_classifier(len(data.classes))
    return QuestionData(data, ImageCollate(encoder), batch_size, config.data.limit)


def labelled_images(c: DictConfig, shape: Shape, whole: bool = False, gallery: bool = False) -> Images:
    """Images of `config.data`, or of its gallery; whole: the encoder reads an image without cropping it."""
    if c.name == "emoji":
        return emoji(shape.patches, list((c.gallery if gallery else c.styles) or ()), c.size, c.background, whole)
    if c.name == "imagefolder":
        return image_folder(c.gallery if gallery else c.path, shape.patches)
    if c.name == "hub_images":
        split = c.gallery if gallery else c.split
        return hub_images(c.path, shape.patches, split, c.image, c.label, c.revision)
    raise UserError(
        f"data={c.name} asks questions, which an encoder does not answer; it sorts labelled images: data={', '.join(SOURCES)}"
    )


@torch.inference_mode()
def encode(encoder: Encoder, images: Images, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features "g d" of all images, unpruned, and their labels "g"."""
    device, collate, features = next(encoder.model.parameters()).device, ImageCollate(encoder), []
    for start in range(0, len(images), batch_size):
        batch = collate([images[i] for i in range(start, min(start + batch_size, len(images)))])
        features.append(encoder.features(batch.inputs["pixel_values"].to(device)))
    return torch.cat(features), torch.tensor([int(label) for label in images.labels], device=device)
