"""Load an image encoder with what sorts its images into classes: a classifier, or the names of the classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ivtp.backbones import ModelError
from ivtp.backbones.checkpoints import check_device, check_finite, read_config
from ivtp.backbones.dinov2_vit import resize
from ivtp.backbones.hub import SMALL, WEIGHTS, Checkpoint, fetch, local, one_line, with_files
from ivtp.backbones.text_encoders import (
    CONFIG,
    OPEN_CLIP,
    OPEN_CLIP_WEIGHTS,
    check_weights,
    open_clip_named,
    trained_with_quick_gelu,
)
from ivtp.models import EMBEDDED, shape_of
from ivtp.pruning.cost import Shape
from ivtp.registry import unknown

EMBEDDED_ENCODERS = {"tiny_clip": EMBEDDED["tiny"]}
TEMPLATES = ("a photo of a {}.",)
TEMPERATURE = 0.07
"""Of the votes of nearest neighbours (arXiv 2104.14294)."""


@dataclass
class Transform:
    """A model's own way from pictures to pixels, with the face of a transformers image processor."""

    one: Callable[[object], Tensor]
    image_mean: Sequence[float]
    image_std: Sequence[float]
    do_normalize: bool = True

    def __call__(self, images, return_tensors: str = "pt") -> dict[str, Tensor]:
        images = images if isinstance(images, (list, tuple)) else [images]
        return {"pixel_values": torch.stack([self.one(image) for image in images])}


@dataclass
class Encoder:
    """A frozen model, its transform, and how its images are sorted into classes.

    see     pixels "b 3 h w" → logits of the model's own classifier "b c", or features in the space of its texts "b d"
    read    texts → features "t d"; None: the model reads none
    feel    pixels → features that are compared with those of other images; default: `see`
    labels  classes of the classifier; 0: it has none
    whole   the transform shows the whole of a square picture
    checkpoint  where the weights came from; None: they are random
    """

    model: nn.Module
    image_processor: object
    see: Callable[[Tensor], Tensor]
    read: Callable[[list[str]], Tensor] | None = None
    feel: Callable[[Tensor], Tensor] | None = None
    labels: int = 0
    whole: bool = True
    checkpoint: Checkpoint | None = None
    _sort: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def logits(self, pixels: Tensor) -> Tensor:
        """Of each image for each class "b c", once it was said how: by classifier, names or neighbours."""
        return self._sort(pixels.to(next(self.model.parameters()).dtype))

    def by_classifier(self, classes: int) -> None:
        """The model's own classifier decides; raises ModelError where it is of other classes."""
        if self.labels != classes:
            has = f"the model's classifier has {self.labels}" if self.labels else "the model has no classifier"
            raise ModelError(
                f"the data has {classes} classes, but {has}; give the data set that it was trained for, a model that reads "
                "class names (model=clip_vit_b16), or model.neighbours=20"
            )
        self._sort = lambda pixels: self.see(pixels).float()

    @torch.inference_mode()
    def by_names(self, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> None:
        """The likeliest name decides, by cosine; a class is the mean of its name in all templates, of unit length (arXiv
        2103.00020)."""
        texts = [template.format(name) for name in classes for template in templates]
        features = nn.functional.normalize(self.read(texts).float(), dim=-1)
        names = nn.functional.normalize(features.view(len(classes), len(templates), -1).mean(1), dim=-1)
        self._sort = lambda pixels: nn.functional.normalize(self.see(pixels).float(), dim=-1) @ names.T

    def by_neighbours(self, neighbours: int, gallery: Tensor, labels: Tensor, classes: int) -> None:
        """The nearest images of a gallery vote, by cosine, weighed by exp(cosine / 0.07) (arXiv 2104.14294). Classes without a
        vote follow in the order of their own nearest images, so that five likeliest classes are known where one image votes.

        gallery  features "g d" of the unpruned model, see `features`; labels "g"
        """
        gallery, marks = nn.functional.normalize(gallery, dim=-1), nn.functional.one_hot(labels, classes).float()

        def sort(pixels: Tensor) -> Tensor:
            likeness = nn.functional.normalize(self.features(pixels), dim=-1) @ gallery.T
            best, index = likeness.topk(min(neighbours, len(gallery)))
            votes = ((best / TEMPERATURE).softmax(-1)[:, :, None] * marks[index]).sum(1)
            lowest = likeness.new_full((len(likeness), classes), -1.0)
            nearest = lowest.scatter_reduce(1, labels.expand_as(likeness), likeness, "amax")
            return torch.where(votes > 0, votes, nearest - 2)

        self._sort = sort

    def features(self, pixels: Tensor) -> Tensor:
        """What stands for each image among others "b d"."""
        pixels = pixels.to(next(self.model.parameters()).dtype)
        return (self.feel or self.see)(pixels).float()


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
    """An image encoder, frozen.

    library     timm (classifiers), open_clip or transformers (CLIP and SigLIP, which read class names; DINOv2)
    source      a hub id (`owner/name` or `owner/name@revision`) or a folder in that library's own format, safetensors
                only; of open_clip also `open_clip:NAME@TAG`; "tiny_clip": the CLIP that the embedded model is made of
    pretrained  False: random weights of the architecture that the source's name says (timm, open_clip)
    Raises ModelError, in one line, for what is missing, truncated, or not stored as safetensors.
    """
    if library not in LIBRARIES:
        raise ModelError(unknown("model.library", str(library), LIBRARIES))
    check_device(device)
    encoder = LIBRARIES[library](source, pretrained, revision, attn_implementation)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    encoder.model.eval().requires_grad_(False).to(device=device, dtype=wanted)
    check_finite(source, encoder.model)
    encoder.model._checkpoint = encoder.checkpoint  # so that a record can say it
    return encoder


def encoder_shape(library: str, source: str, revision: str | None = None) -> Shape:
    """Sizes of an encoder from its name or its config alone: no weights are read, nor made."""
    if library == "transformers":
        return shape_of(_transformers_config(source, revision)[1])
    with torch.device("meta"):
        model = LIBRARIES[library](source, False, revision, None).model
    return shape_of(model)


def _timm(source: str, pretrained: bool, revision: str | None, _) -> Encoder:
    import timm

    where, found = source.rsplit("/", 1)[-1], None
    if pretrained or local(source).is_dir():
        found = _fetched(source, revision, ["config.json"], ["model.safetensors"])
        where = f"local-dir:{found.folder}"
    with one_line(source):
        model = timm.create_model(where, pretrained=pretrained)
    settings = timm.data.resolve_model_data_config(model)
    if side := getattr(model.patch_embed, "img_size", None):  # older versions give that of the pretrained weights
        settings["input_size"] = (settings["input_size"][0], *side)
    transform = Transform(timm.data.create_transform(**settings), settings["mean"], settings["std"])
    whole = settings["crop_pct"] == 1 or settings["crop_mode"] == "squash"

    def feel(pixels: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(pixels), pre_logits=True)

    return Encoder(model, transform, model, feel=feel, labels=model.num_classes, whole=whole, checkpoint=found)


def _open_clip(source: str, pretrained: bool, revision: str | None, _) -> Encoder:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    where, found, weights, quick = source, None, OPEN_CLIP_WEIGHTS, None
    if source.startswith(OPEN_CLIP):
        named = open_clip_named(source, revision)
        where, source, revision, weights = named.name, named.repository, named.revision, named.weights
        quick = bool(named.model.get("quick_gelu"))
    if pretrained or local(source).is_dir():
        # A repository may hold the same weights twice, for transformers or timm too.
        small = [CONFIG, "*token*", "vocab*", "merges.txt", "*.model"]
        found = _fetched(source, revision, small, weights)
        where = f"local-dir:{found.folder}"
        quick = trained_with_quick_gelu(found.source) if quick is None else quick
    device = torch.get_default_device()  # "meta" for the sizes alone
    with one_line(source), hushed():
        model = open_clip.create_model(
            where,
            device=device,
            load_weights=pretrained,
            require_pretrained=pretrained,
            pretrained_text=False,
            force_quick_gelu=bool(quick),
        )
        tokenizer = open_clip.get_tokenizer(where)
    settings = model.visual.preprocess_cfg
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    transform = Transform(transform, settings["mean"], settings["std"])

    def read(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts).to(next(model.parameters()).device))

    return Encoder(model, transform, model.encode_image, read, checkpoint=found)


def _transformers(source: str, pretrained: bool, revision: str | None, attn_implementation: str | None) -> Encoder:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    if source in EMBEDDED_ENCODERS:
        return _embedded(Checkpoint(source, EMBEDDED_ENCODERS[source]))
    if not pretrained:
        raise ModelError(
            "pretrained=false: transformers' encoders are loaded with their weights; give a folder of them"
        )
    checkpoint, config = _transformers_config(source, revision)
    checkpoint = with_files(checkpoint, [*SMALL, *WEIGHTS])
    check_weights(checkpoint, WEIGHTS, library="model.library=open_clip model.source=")
    settings = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with one_line(source):
        model = AutoModel.from_pretrained(checkpoint.folder, use_safetensors=True, **settings)
        images = AutoImageProcessor.from_pretrained(checkpoint.folder)
        if config.model_type == "dinov2":
            return _dinov2(model, images, config.image_size, checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    return _dual(model, images, tokenizer, checkpoint)


def _transformers_config(source: str, revision: str | None):
    """The small files of a CLIP, SigLIP or DINOv2 of transformers, and its config; of a DINOv2, which takes images of any
    size, for the size that its processor makes."""
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


def _dinov2(model: nn.Module, image_processor, side: int, checkpoint: Checkpoint) -> Encoder:
    """A DINOv2 of transformers for images of one size; it reads no names and has no classifier."""
    resize(model, side)

    def see(pixels: Tensor) -> Tensor:
        return model(pixels).pooler_output

    return Encoder(model, image_processor, see, whole=_whole(image_processor), checkpoint=checkpoint)


def _whole(image_processor) -> bool:
    """Whether a processor of transformers shows the whole of a square picture."""
    size, crop = (getattr(image_processor, name, None) or {} for name in ("size", "crop_size"))
    return not getattr(image_processor, "do_center_crop", False) or size.get("shortest_edge") == crop.get("height")


def _dual(model: nn.Module, image_processor, tokenizer, checkpoint: Checkpoint) -> Encoder:
    """A CLIP or SigLIP of transformers; SigLIP was trained on texts that are padded to its whole context."""
    padding = "max_length" if model.config.model_type == "siglip" else True

    def read(texts: list[str]) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        ids = tokenizer(texts, padding=padding, max_length=length, truncation=True, return_tensors="pt")
        keys = {"input_ids", "attention_mask"} if model.config.model_type == "clip" else {"input_ids"}
        given = {name: ids[name].to(model.device) for name in keys if name in ids}
        return model.get_text_features(**given).pooler_output

    def see(pixels: Tensor) -> Tensor:
        return model.get_image_features(pixels).pooler_output

    return Encoder(model, image_processor, see, read, whole=_whole(image_processor), checkpoint=checkpoint)


def _embedded(checkpoint: Checkpoint) -> Encoder:
    """The vision tower of the embedded LLaVA and the text half beside it: one CLIP, as it was trained."""
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

    folder, half = checkpoint.folder, "vision_tower."
    tower = {k: v for k, v in load_file(folder / "model.safetensors").items() if k.startswith(half)}
    weights = {f"vision_model.{key.removeprefix(half)}": value for key, value in tower.items()}
    model = CLIPModel(CLIPConfig.from_pretrained(folder / "clip"))
    model.load_state_dict(weights | load_file(folder / "clip" / "model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    return _dual(model, AutoImageProcessor.from_pretrained(folder), tokenizer, checkpoint)


@contextmanager
def hushed() -> Iterator[None]:
    """open_clip warns on the root logger of what is asked of it on purpose."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


LIBRARIES = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers}


def _fetched(source: str, revision: str | None, small: list[str], weights: list[str]) -> Checkpoint:
    """A checkpoint in its folder, from the hub if it is none; without pickles."""
    checkpoint = fetch(source, revision, [*small, *weights])
    check_weights(checkpoint, weights)
    return checkpoint
