"""Load CLIP text encoders: from transformers' or open_clip's format, a folder or the hub, safetensors only."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ivtp.backbones.family import ModelError, layers_of
from ivtp.backbones.loading.checks import check_weight_files, weight_files
from ivtp.backbones.loading.hub import SMALL, WEIGHTS, Checkpoint, fetch, one_line, straight_to, with_files
from ivtp.backbones.text.encoders import OpenClipText, TextEncoder, TransformersText
from ivtp.core.flops import Layers
from ivtp.registry import unknown

OPEN_CLIP = "open_clip:"
CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"]
TEXT_MODELS = ("clip", "clip_text_model")
VISUAL = "visual.proj"


@dataclass(frozen=True)
class Named:
    """A checkpoint of open_clip by name: its place on the hub, and the settings of its training."""

    name: str
    repository: str
    weights: list[str]
    revision: str | None
    model: dict


def open_clip_named(source: str, revision: str | None = None) -> Named:
    """Look up `open_clip:NAME@TAG` or `open_clip:NAME@TAG@REVISION` in open_clip's own table of checkpoints.

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
    model: Any = open_clip.get_model_config(name)
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
    model: Any
    weights: list[str]

    def sizes(self) -> dict:
        """Sizes of the text encoder, for `Shape`."""
        if self.format == "transformers":
            text = getattr(self.model, "text_config", self.model)  # a whole CLIP, or its text half alone
            sizes, context, joint = layers_of(text), text.max_position_embeddings, self.model.projection_dim
        else:
            text, joint = self.model["text_cfg"], self.model["embed_dim"]
            width, heads, depth = text.get("width", 512), text.get("heads", 8), text.get("layers", 12)
            ffn, context = int(width * text.get("mlp_ratio", 4.0)), text.get("context_length", 77)
            sizes = Layers(depth, width, ffn, heads, heads, width // heads, 2)
        return {"text": sizes, "text_context": context, "joint": joint}

    def complete(self) -> TextSource:
        """Fetch its weights if they are not here yet. Raises ModelError where only pickles are."""
        checkpoint = with_files(self.checkpoint, [*SMALL, *self.weights])
        check_weight_files(checkpoint, self.weights)
        return replace(self, checkpoint=checkpoint)


def text_source(source: str, revision: str | None = None) -> TextSource:
    """Identify a source from its small files alone.

    source  `open_clip:NAME@TAG[@REVISION]`, or a folder or hub id (`owner/name[@REVISION]`) in the format of
            transformers or, if it has none, of open_clip
    Raises ModelError in one line.
    """
    if source.startswith(OPEN_CLIP):
        named = open_clip_named(source, revision)
        checkpoint = fetch(named.repository, named.revision, [CONFIG])
        model = _json(checkpoint.folder / CONFIG).get("model_cfg") or named.model
        return _checked(checkpoint, {**model, "quick_gelu": bool(named.model.get("quick_gelu"))}, named.weights)
    checkpoint = fetch(source, revision, SMALL)
    kind = _json(checkpoint.folder / "config.json").get("model_type")
    if kind in TEXT_MODELS:
        from transformers import AutoConfig

        with one_line(source):
            config = AutoConfig.from_pretrained(checkpoint.folder)
        return TextSource(checkpoint, "transformers", config, WEIGHTS)
    model = _json(checkpoint.folder / CONFIG).get("model_cfg")
    if model is None:
        content = f"a {kind!r} model" if kind else "no checkpoint of transformers or open_clip"
        raise ModelError(f"{source} is {content}; a text encoder is a CLIP in transformers' or open_clip's format")
    trained = trained_with_quick_gelu(checkpoint.source)
    return _checked(checkpoint, model if trained is None else {**model, "quick_gelu": trained}, OPEN_CLIP_WEIGHTS)


def _checked(checkpoint: Checkpoint, model: dict, weights: list[str]) -> TextSource:
    text = model.get("text_cfg", {})
    other = next(
        filter(None, map(text.get, ("hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls"))), None
    )
    if other or "embed_dim" not in model:
        raise ModelError(
            f"{checkpoint.source} has no causal text tower with CLIP's own tokenizer ({other or 'no embed_dim'}); use "
            "another CLIP"
        )
    return TextSource(checkpoint, "open_clip", model, weights)


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable: {error}") from error
    return content if isinstance(content, dict) else {}


def read_tensors(
    files: list[Path], wanted: Callable[[str], bool], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Read the wanted tensors of some safetensors files, and no others, straight to a device."""
    from safetensors import safe_open

    tensors = {}
    for path in files:
        with safe_open(path, "pt", str(device)) as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118
    return tensors


def load_text_encoder(source: str | TextSource, device: str | torch.device = "cpu") -> TextEncoder:
    """Load the text half of a CLIP and its projections, frozen, without the vision tower. Sources: see `text_source`."""
    source = (text_source(source) if isinstance(source, str) else source).complete()
    with one_line(source.checkpoint.source):
        load = _transformers if source.format == "transformers" else _open_clip
        return load(source, device)


def _transformers(source: TextSource, device: str | torch.device) -> TransformersText:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    folder, key = source.checkpoint.folder, "visual_projection.weight"
    with quiet():
        model: Any = CLIPTextModelWithProjection.from_pretrained(folder, use_safetensors=True, **straight_to(device))
    projection = read_tensors(weight_files(folder, source.weights), lambda name: name == key, device)
    if not projection:
        raise ModelError(f"{source.checkpoint.source} has no {key}; give the whole CLIP, not its text half alone")
    return TransformersText(model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder), projection[key])


@contextmanager
def quiet():
    """Context without transformers' report of unread keys: the other half of the CLIP is left out on purpose."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _open_clip(source: TextSource, device: str | torch.device) -> OpenClipText:
    import open_clip
    from open_clip.model import _build_text_tower

    text_cfg = source.model["text_cfg"]
    with torch.device("meta"):
        text: Any = _build_text_tower(source.model["embed_dim"], text_cfg, bool(source.model.get("quick_gelu")))
    state = read_tensors(
        weight_files(source.checkpoint.folder, source.weights),
        lambda name: not name.startswith("visual.") or name == VISUAL,
        device,
    )
    projection = state.pop(VISUAL, None)
    if projection is None:
        raise ModelError(
            f"{source.checkpoint.source} has no {VISUAL}: its image tower is not CLIP's own; use another CLIP"
        )
    # The text tower's weights lie at the top of a `CLIP`, under `text` in a `CustomTextCLIP`.
    state = {key.removeprefix("text."): value.float() for key, value in state.items()}
    parameters = text.state_dict()
    if lacking := sorted(parameters.keys() - state.keys()):
        raise ModelError(f"{source.checkpoint.source} lacks weights, e.g. {lacking[0]}; the checkpoint is incomplete")
    text.load_state_dict({key: state[key] for key in parameters}, assign=True)
    text.attn_mask = text.build_causal_mask()  # a buffer that checkpoints do not hold
    tokenizer = open_clip.SimpleTokenizer(context_length=text.context_length)
    return OpenClipText(text.eval().requires_grad_(False).to(device), tokenizer, projection.float())
