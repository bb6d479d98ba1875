"""Load CLIP text encoders: from transformers' or open_clip's format, a folder or the hub, safetensors only."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ivtp.backbones import ModelError
from ivtp.backbones.guidance import OpenClipText, TextEncoder, TransformersText, text_layers
from ivtp.backbones.hub import SMALL, WEIGHTS, Checkpoint, fetch, one_line, with_files
from ivtp.pruning.cost import Layers
from ivtp.registry import unknown

OPEN_CLIP = "open_clip:"
CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"]
TEXT_MODELS = ("clip", "clip_text_model")
VISUAL = "visual.proj"

AS_SAFETENSORS = {
    "openai/clip-vit-large-patch14-336": "open_clip:ViT-L-14-336-quickgelu@openai",
    "openai/clip-vit-large-patch14": "open_clip:ViT-L-14-quickgelu@openai",
    "openai/clip-vit-base-patch16": "open_clip:ViT-B-16-quickgelu@openai",
    "openai/clip-vit-base-patch32": "open_clip:ViT-B-32-quickgelu@openai",
}
"""OpenAI's CLIPs, whose own repositories may have pickles alone, and the same weights as safetensors."""


@dataclass(frozen=True)
class Named:
    """A checkpoint of open_clip by name: where its weights are on the hub, and the settings that they were trained with."""

    name: str
    repository: str
    weights: list[str]
    revision: str | None
    model: dict


def open_clip_named(source: str, revision: str | None = None) -> Named:
    """`open_clip:NAME@TAG` or `open_clip:NAME@TAG@REVISION` looked up in open_clip's own table of checkpoints.

    Raises ModelError for a name without its tag (random weights), and for an activation other than the tag's.
    """
    import open_clip
    from open_clip import pretrained

    name, *rest = source.removeprefix(OPEN_CLIP).split("@")
    if name not in open_clip.list_models():
        raise ModelError(unknown("open_clip model", name, open_clip.list_models()) + f" (in {source!r})")
    tags = open_clip.list_pretrained_tags_by_model(name)
    listed = f"open_clip has of it: {', '.join(tags)}" if tags else "open_clip has no weights of this name"
    if not rest or not rest[0]:
        raise ModelError(
            f"{source!r} has no tag, so that its weights would be random; write {OPEN_CLIP}{name}@TAG: {listed}"
        )
    tag, inside = rest[0], rest[1] if len(rest) == 2 else None
    if len(rest) > 2 or inside == "":
        raise ModelError(f"{source!r} is not understood; write {OPEN_CLIP}NAME@TAG or {OPEN_CLIP}NAME@TAG@REVISION")
    if inside is not None and revision not in (None, inside):
        raise ModelError(f"{source!r} names revision {inside!r}, but revision={revision!r} is given too; keep one")
    about = pretrained.get_pretrained_cfg(name, tag)
    if not about:
        raise ModelError(f"{source!r} has a tag that open_clip does not know; {listed}")
    model = open_clip.get_model_config(name)
    quick, trained_quick = bool(model.get("quick_gelu")), bool(about.get("quick_gelu"))
    if quick != trained_quick:
        other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        words = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
        raise ModelError(
            f"{source!r} would run {words[0]} on weights that were trained with {words[1]}; use {OPEN_CLIP}{other}@{tag}"
        )
    repository, _, file = about.get("hf_hub", "").rpartition("/")
    if not repository:
        raise ModelError(f"{source!r} is published as a pickle alone, which is never opened here; {listed}")
    weights = [str(Path(file).with_suffix(".safetensors"))] if file else OPEN_CLIP_WEIGHTS
    return Named(name, repository, weights, inside or revision, model)


def trained_with_quick_gelu(repository: str) -> bool | None:
    """Activation of a repository in open_clip's table, True for QuickGELU; None for one that it does not list."""
    from open_clip import pretrained

    for name, tag in pretrained.list_pretrained():
        about = pretrained.get_pretrained_cfg(name, tag)
        if about.get("hf_hub", "").rpartition("/")[0] == repository:
            return bool(about.get("quick_gelu"))
    return None


@dataclass(frozen=True)
class TextSource:
    """Source of a text encoder whose small files are here: format, settings and revision.

    model  open_clip's settings, or transformers' config
    """

    checkpoint: Checkpoint
    format: str
    model: object
    weights: list[str]

    def sizes(self) -> dict:
        """Sizes of the text encoder, for `Shape`."""
        if self.format == "transformers":
            text = getattr(self.model, "text_config", self.model)  # a whole CLIP, or its text half alone
            joint = self.model.projection_dim
            return {"text": text_layers(text), "text_context": text.max_position_embeddings, "joint": joint}
        text = self.model["text_cfg"]
        width, heads, layers = text.get("width", 512), text.get("heads", 8), text.get("layers", 12)
        ffn = int(width * text.get("mlp_ratio", 4.0))
        sizes = Layers(layers, width, ffn, heads, heads, width // heads, 2)
        return {"text": sizes, "text_context": text.get("context_length", 77), "joint": self.model["embed_dim"]}

    def complete(self) -> TextSource:
        """The same with its weights, fetched if they are not here yet. Raises ModelError where only pickles are."""
        checkpoint = with_files(self.checkpoint, [*SMALL, *self.weights])
        check_weights(checkpoint, self.weights)
        return replace(self, checkpoint=checkpoint)


def text_source(source: str, revision: str | None = None) -> TextSource:
    """Find out what a source names, from its small files alone.

    source  `open_clip:NAME@TAG[@REVISION]`, or a folder or hub id (`owner/name[@REVISION]`) in the format of
            transformers or, if it has none, of open_clip
    Raises ModelError in one line.
    """
    named = open_clip_named(source, revision) if source.startswith(OPEN_CLIP) else None
    if named:
        checkpoint = fetch(named.repository, named.revision, [CONFIG])
        model = _open_clip_model(checkpoint.folder) or named.model
        return _checked(checkpoint, {**model, "quick_gelu": bool(named.model.get("quick_gelu"))}, named.weights)
    checkpoint = fetch(source, revision, SMALL)
    kind = _model_type(checkpoint.folder)
    if kind in TEXT_MODELS:
        from transformers import AutoConfig

        with one_line(source):
            config = AutoConfig.from_pretrained(checkpoint.folder)
        return TextSource(checkpoint, "transformers", config, WEIGHTS)
    model = _open_clip_model(checkpoint.folder)
    if model is None:
        said = f"a {kind!r} model" if kind else "no checkpoint of transformers or open_clip"
        raise ModelError(f"{source} is {said}; a text encoder is a CLIP in transformers' or open_clip's format")
    trained = trained_with_quick_gelu(checkpoint.source)
    if trained is not None:
        model = {**model, "quick_gelu": trained}
    return _checked(checkpoint, model, OPEN_CLIP_WEIGHTS)


def _checked(checkpoint: Checkpoint, model: dict, weights: list[str]) -> TextSource:
    text = model.get("text_cfg", {})
    other = (
        text.get("hf_model_name")
        or text.get("hf_tokenizer_name")
        or text.get("no_causal_mask")
        or text.get("embed_cls")
    )
    if other or "embed_dim" not in model:
        raise ModelError(
            f"{checkpoint.source} has no causal text tower with CLIP's own tokenizer ({other or 'no embed_dim'}); use "
            "another CLIP"
        )
    return TextSource(checkpoint, "open_clip", model, weights)


def _model_type(folder: Path) -> str | None:
    return _json(folder / "config.json").get("model_type")


def _open_clip_model(folder: Path) -> dict | None:
    return _json(folder / CONFIG).get("model_cfg")


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable: {error}") from error
    return found if isinstance(found, dict) else {}


def weight_files(folder: Path, names: list[str]) -> list[Path]:
    """The safetensors of a checkpoint: of the first pattern that any file matches."""
    for name in names:
        if found := sorted(folder.glob(name)):
            return found
    return []


def read_tensors(files: list[Path], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors of some safetensors files; no others are read."""
    from safetensors import safe_open

    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118
    return found


def check_weights(checkpoint: Checkpoint, names: list[str], library: str = "") -> None:
    """Raise ModelError for a checkpoint without safetensors; of OpenAI's CLIPs it names the same weights in open_clip's form.

    names    patterns of the files, the usual one first; library: what stands before the name in a command
    """
    if weight_files(checkpoint.folder, names):
        return
    same = AS_SAFETENSORS.get(checkpoint.source)
    hint = f"; the same weights as safetensors: {library}{same}" if same else ""
    raise ModelError(f"{checkpoint.source} has no {names[0]}; other formats (pickles) are never opened here{hint}")


def load_text_encoder(source: str | TextSource, device: str | torch.device = "cpu") -> TextEncoder:
    """The text half of a CLIP and its projections, frozen; the vision tower is not even read. Sources: `text_source`."""
    found = (text_source(source) if isinstance(source, str) else source).complete()
    with one_line(found.checkpoint.source):
        load = _transformers if found.format == "transformers" else _open_clip
        return load(found, device)


def _transformers(found: TextSource, device) -> TransformersText:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    folder = found.checkpoint.folder
    with quiet():
        model = CLIPTextModelWithProjection.from_pretrained(folder, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    key = "visual_projection.weight"
    projection = read_tensors(weight_files(folder, found.weights), lambda name: name == key)
    if not projection:
        raise ModelError(f"{found.checkpoint.source} has no {key}; give the whole CLIP, not its text half alone")
    return TransformersText(model.requires_grad_(False).to(device), tokenizer, projection[key].to(device))


@contextmanager
def quiet():
    """The other half of the CLIP is left out on purpose: no report of unread keys."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _open_clip(found: TextSource, device) -> OpenClipText:
    import open_clip
    from open_clip.model import _build_text_tower

    text_cfg = found.model["text_cfg"]
    with torch.device("meta"):
        text = _build_text_tower(found.model["embed_dim"], text_cfg, bool(found.model.get("quick_gelu")))
    state = read_tensors(
        weight_files(found.checkpoint.folder, found.weights),
        lambda name: not name.startswith("visual.") or name == VISUAL,
    )
    projection = state.pop(VISUAL, None)
    if projection is None:
        raise ModelError(
            f"{found.checkpoint.source} has no {VISUAL}: its image tower is not CLIP's own; use another CLIP"
        )
    # The text tower stands at the top of a `CLIP`, under `text` in a `CustomTextCLIP`.
    state = {key.removeprefix("text."): value.float() for key, value in state.items()}
    own = text.state_dict()
    if lacking := sorted(own.keys() - state.keys()):
        raise ModelError(f"{found.checkpoint.source} lacks weights, e.g. {lacking[0]}; the checkpoint is incomplete")
    text.load_state_dict({key: state[key] for key in own}, assign=True)
    text.attn_mask = text.build_causal_mask()  # a buffer that checkpoints do not hold
    tokenizer = open_clip.SimpleTokenizer(context_length=text.context_length)
    return OpenClipText(text.eval().requires_grad_(False).to(device), tokenizer, projection.float().to(device))
