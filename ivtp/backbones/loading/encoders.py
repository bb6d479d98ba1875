"""Load an image encoder together with a way to classify its images: by classifier, class names or neighbours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from ivtp.backbones.family import ModelError, shape_of
from ivtp.backbones.loading.checks import check_device, check_finite, check_weight_files, read_config
from ivtp.backbones.loading.hub import (
    EMBEDDED,
    SMALL,
    WEIGHTS,
    Checkpoint,
    fetch,
    local,
    one_line,
    straight_to,
    with_files,
)
from ivtp.backbones.text.loading import (
    CONFIG,
    OPEN_CLIP,
    OPEN_CLIP_WEIGHTS,
    open_clip_named,
    read_tensors,
    trained_with_quick_gelu,
)
from ivtp.backbones.vision.transformers import resize
from ivtp.core.flops import Shape
from ivtp.registry import unknown

EMBEDDED_ENCODERS = {"tiny_clip": EMBEDDED["tiny"]}
TEMPLATES = ("a photo of a {}.",)
TEMPERATURE = 0.07
"""Temperature of the votes of nearest neighbours (arXiv 2104.14294)."""


@dataclass
class Transform:
    """Wrap an image transform as a transformers image processor."""

    one: Any
    image_mean: Sequence[float]
    image_std: Sequence[float]
    do_normalize: bool = True

    def __call__(self, images: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        images = images if isinstance(images, (list, tuple)) else [images]
        return {"pixel_values": torch.stack([self.one(image) for image in images])}


@dataclass
class Encoder:
    """A frozen model, its transform, and its way to classify images.

    outputs         pixels "b 3 h w" → logits of the model's own classifier "b c", or features in its texts' space "b d"
    text_features   texts → features "t d"; None: the model has no text half
    image_features  pixels → features to compare with those of other images; default: `outputs`
    labels          classes of the classifier; 0: it has none
    whole           the transform keeps the whole of a square image
    checkpoint      source of the weights; None: they are random
    """

    model: Any
    image_processor: Any
    outputs: Callable[[Tensor], Tensor]
    text_features: Callable[[list[str]], Tensor] | None = None
    image_features: Callable[[Tensor], Tensor] | None = None
    labels: int = 0
    whole: bool = True
    checkpoint: Checkpoint | None = None
    _classify: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits of each image "b c", after a choice of `by_classifier`, `by_names` or `by_neighbours`."""
        assert self._classify is not None
        return self._classify(pixels.to(next(self.model.parameters()).dtype))

    def by_classifier(self, classes: int) -> None:
        """Classify by the model's own classifier; raises ModelError where it has other classes."""
        if self.labels != classes:
            has = f"the model's classifier has {self.labels}" if self.labels else "the model has no classifier"
            raise ModelError(
                f"the data has {classes} classes, but {has}; give the data set that it was trained for, a model that reads "
                "class names (model=clip_vit_b16), or model.neighbours=20"
            )
        self._classify = lambda pixels: self.outputs(pixels).float()

    @torch.inference_mode()
    def by_names(self, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> None:
        """Classify by the nearest class name, by cosine.

        A class is the mean of its name in all templates, of unit length (arXiv 2103.00020).
        """
        assert self.text_features is not None
        texts = [template.format(name) for name in classes for template in templates]
        features = normalize(self.text_features(texts).float(), dim=-1).view(len(classes), len(templates), -1)
        names = normalize(features.mean(1), dim=-1)
        self._classify = lambda pixels: normalize(self.outputs(pixels).float(), dim=-1) @ names.T

    def by_neighbours(self, neighbours: int, gallery: Tensor, labels: Tensor, classes: int) -> None:
        """Classify by the nearest images of a gallery, which vote by exp(cosine / 0.07) (arXiv 2104.14294).

        Classes without a vote follow in the order of their own nearest images, so that five likeliest classes are known
        where one image votes.

        gallery  features "g d" of the unpruned model, see `features`; labels "g"
        """
        gallery, marks = normalize(gallery, dim=-1), one_hot(labels, classes).float()

        def classify(pixels: Tensor) -> Tensor:
            likeness = normalize(self.features(pixels), dim=-1) @ gallery.T
            best, index = likeness.topk(min(neighbours, len(gallery)))
            votes = ((best / TEMPERATURE).softmax(-1)[:, :, None] * marks[index]).sum(1)
            lowest = likeness.new_full((len(likeness), classes), -1.0)
            nearest = lowest.scatter_reduce(1, labels.expand_as(likeness), likeness, "amax")
            return torch.where(votes > 0, votes, nearest - 2)

        self._classify = classify

    def features(self, pixels: Tensor) -> Tensor:
        """Features of each image for comparison with other images "b d"."""
        pixels = pixels.to(next(self.model.parameters()).dtype)
        return (self.image_features or self.outputs)(pixels).float()


def load_encoder(
    library: str,
    source: str,
    *,
    pretrained: bool = True,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> Encoder:
    """Load an image encoder, frozen.

    library     timm (classifiers), open_clip or transformers (CLIP and SigLIP, which read class names; DINOv2)
    source      a hub id (`owner/name` or `owner/name@revision`) or a folder in that library's own format, safetensors
                only; of open_clip also `open_clip:NAME@TAG`; "tiny_clip": the CLIP that the embedded model is made of
    pretrained  False: random weights of the architecture that the source's name says (timm, open_clip)
    Raises ModelError, in one line, for what is missing, truncated, or not stored as safetensors.
    """
    if library not in LIBRARIES:
        raise ModelError(unknown("model.library", str(library), LIBRARIES))
    check_device(device)
    settings = straight_to(device) | ({"attn_implementation": attn_implementation} if attn_implementation else {})
    encoder = LIBRARIES[library](source, pretrained, revision, settings)
    weights = None if dtype == "auto" else getattr(torch, dtype)
    encoder.model.eval().requires_grad_(False).to(device=device, dtype=weights)
    check_finite(source, encoder.model)
    encoder.model._checkpoint = encoder.checkpoint  # for the record of a run
    return encoder


def encoder_shape(library: str, source: str, revision: str | None = None) -> Shape:
    """Sizes of an encoder from its name or its config alone: no weights are read or made."""
    if library == "transformers":
        return shape_of(_transformers_config(source, revision)[1])
    with torch.device("meta"):
        model = LIBRARIES[library](source, False, revision, {}).model
    return shape_of(model)


def _timm(source: str, pretrained: bool, revision: str | None, _: object) -> Encoder:
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    where, checkpoint = source.rsplit("/", 1)[-1], None
    if pretrained or local(source).is_dir():
        checkpoint = _fetched(source, revision, ["config.json"], ["model.safetensors"])
        where = f"local-dir:{checkpoint.folder}"
    with one_line(source):
        model: Any = timm.create_model(where, pretrained=pretrained)
    settings = resolve_model_data_config(model)
    if side := getattr(model.patch_embed, "img_size", None):  # older versions give that of the pretrained weights
        settings["input_size"] = (settings["input_size"][0], *side)
    transform = Transform(create_transform(**settings), settings["mean"], settings["std"])
    whole = settings["crop_pct"] == 1 or settings["crop_mode"] == "squash"

    def image_features(pixels: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(pixels), pre_logits=True)

    return Encoder(
        model,
        transform,
        outputs=model,
        image_features=image_features,
        labels=model.num_classes,
        whole=whole,
        checkpoint=checkpoint,
    )


def _open_clip(source: str, pretrained: bool, revision: str | None, _: object) -> Encoder:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    where, checkpoint, weights, quick = source, None, OPEN_CLIP_WEIGHTS, None
    if source.startswith(OPEN_CLIP):
        named = open_clip_named(source, revision)
        where, source, revision, weights = named.name, named.repository, named.revision, named.weights
        quick = bool(named.model.get("quick_gelu"))
    if pretrained or local(source).is_dir():
        # A repository may hold the same weights twice, for transformers or timm too.
        small = [CONFIG, "*token*", "vocab*", "merges.txt", "*.model"]
        checkpoint = _fetched(source, revision, small, weights)
        where = f"local-dir:{checkpoint.folder}"
        quick = trained_with_quick_gelu(checkpoint.source) if quick is None else quick
    with one_line(source), hushed():
        model: Any = open_clip.create_model(
            where,
            device=torch.get_default_device(),  # "meta" for the sizes alone
            load_weights=pretrained,
            require_pretrained=pretrained,
            pretrained_text=False,
            force_quick_gelu=bool(quick),
        )
        tokenizer = open_clip.get_tokenizer(where)
    settings = model.visual.preprocess_cfg
    one = image_transform_v2(PreprocessCfg(**settings), is_train=False)

    def text_features(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts).to(next(model.parameters()).device))

    transform = Transform(one, settings["mean"], settings["std"])
    return Encoder(model, transform, model.encode_image, text_features, checkpoint=checkpoint)


def _transformers(source: str, pretrained: bool, revision: str | None, settings: dict) -> Encoder:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    if source in EMBEDDED_ENCODERS:
        folder, checkpoint = EMBEDDED_ENCODERS[source], Checkpoint(source, EMBEDDED_ENCODERS[source])
        model, images = _embedded(folder), AutoImageProcessor.from_pretrained(folder)
        return _dual(model, images, AutoTokenizer.from_pretrained(folder / "clip"), checkpoint)
    if not pretrained:
        raise ModelError(
            "pretrained=false: transformers' encoders are loaded with their weights; give a folder of them"
        )
    checkpoint, config = _transformers_config(source, revision)
    checkpoint = with_files(checkpoint, [*SMALL, *WEIGHTS])
    check_weight_files(checkpoint, WEIGHTS, library="model.library=open_clip model.source=")
    with one_line(source):
        model: Any = AutoModel.from_pretrained(checkpoint.folder, use_safetensors=True, **settings)
        images = AutoImageProcessor.from_pretrained(checkpoint.folder)
        if config.model_type != "dinov2":
            return _dual(model, images, AutoTokenizer.from_pretrained(checkpoint.folder), checkpoint)
        # It takes images of one size, reads no names and has no classifier.
        resize(model, config.image_size)
    return Encoder(
        model, images, lambda pixels: model(pixels).pooler_output, whole=_whole(images), checkpoint=checkpoint
    )


def _transformers_config(source: str, revision: str | None) -> tuple[Checkpoint, Any]:
    """Small files and config of a CLIP, SigLIP or DINOv2 of transformers.

    A DINOv2 takes images of any size; its config is for the size that its processor makes.
    """
    from transformers import AutoConfig, AutoImageProcessor

    embedded = EMBEDDED_ENCODERS.get(source)
    checkpoint = Checkpoint(source, embedded / "clip") if embedded else fetch(source, revision, SMALL)
    read_config(checkpoint)
    with one_line(source):
        config = AutoConfig.from_pretrained(checkpoint.folder)
    if config.model_type not in ("clip", "siglip", "dinov2"):
        raise ModelError(f"{source} is a {config.model_type!r} model; encoders of transformers: clip, siglip, dinov2")
    if config.model_type == "dinov2":
        with one_line(source):
            images = AutoImageProcessor.from_pretrained(checkpoint.folder)
        config.image_size = (images.crop_size if images.do_center_crop else images.size)["height"]
    return checkpoint, config


def _whole(image_processor: Any) -> bool:
    """Return whether a processor of transformers keeps the whole of a square image."""
    size, crop = (getattr(image_processor, name, None) or {} for name in ("size", "crop_size"))
    return not getattr(image_processor, "do_center_crop", False) or size.get("shortest_edge") == crop.get("height")


def _dual(model: Any, image_processor: Any, tokenizer: Any, checkpoint: Checkpoint) -> Encoder:
    """Wrap a CLIP or SigLIP of transformers; SigLIP was trained on texts that are padded to its whole context."""
    is_clip = model.config.model_type == "clip"
    names = ("input_ids", "attention_mask") if is_clip else ("input_ids",)

    def text_features(texts: list[str]) -> Tensor:
        length, padding = model.config.text_config.max_position_embeddings, True if is_clip else "max_length"
        ids = tokenizer(texts, padding=padding, max_length=length, truncation=True, return_tensors="pt")
        inputs = {name: ids[name].to(model.device) for name in names if name in ids}
        return model.get_text_features(**inputs).pooler_output

    def outputs(pixels: Tensor) -> Tensor:
        return model.get_image_features(pixels).pooler_output

    return Encoder(model, image_processor, outputs, text_features, whole=_whole(image_processor), checkpoint=checkpoint)


def _embedded(folder: Path) -> nn.Module:
    """Join the vision tower of the embedded LLaVA and the text half beside it to the CLIP that was trained."""
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel

    half, weights = "vision_tower.", load_file(folder / "clip" / "model.safetensors")
    tower = read_tensors([folder / "model.safetensors"], lambda name: name.startswith(half))
    weights |= {f"vision_model.{name.removeprefix(half)}": value for name, value in tower.items()}
    model = CLIPModel(CLIPConfig.from_pretrained(folder / "clip"))
    model.load_state_dict(weights)
    return model


@contextmanager
def hushed() -> Iterator[None]:
    """Context without open_clip's warnings on the root logger about settings that are chosen on purpose."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


LIBRARIES = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers}


def _fetched(source: str, revision: str | None, small: list[str], weights: list[str]) -> Checkpoint:
    """Fetch a checkpoint from its folder or the hub, without pickles."""
    checkpoint = fetch(source, revision, [*small, *weights])
    check_weight_files(checkpoint, weights)
    return checkpoint
