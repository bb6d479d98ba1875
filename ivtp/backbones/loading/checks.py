"""Check a checkpoint before and after its weights are read: its format, its sizes, its numbers, its device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ivtp.backbones.family import ModelError
from ivtp.backbones.loading.hub import Checkpoint

ORIGINALS = {
    "llava_llama": "llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl_chat": "OpenGVLab/InternVL3-8B-hf",
}
"""Formats of the authors' own code, which transformers does not read, and a checkpoint of each in transformers' format."""

ARCHITECTURES = {
    "LlavaLlama": "llava_llama",
    "LlavaMistral": "llava_mistral",
    "LlavaQwen": "llava_qwen",
    "InternVLChat": "internvl_chat",
}

LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "head_dim", "patch_size"), 10_000),
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "image_size"), 1_000_000),
    "vocab_size": 100_000_000,
}
"""Sizes in a config and a bound that no model comes near; building a larger model would never end."""

ANY = ["*.safetensors"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

AS_SAFETENSORS = {
    "openai/clip-vit-large-patch14-336": "open_clip:ViT-L-14-336-quickgelu@openai",
    "openai/clip-vit-large-patch14": "open_clip:ViT-L-14-quickgelu@openai",
    "openai/clip-vit-base-patch16": "open_clip:ViT-B-16-quickgelu@openai",
    "openai/clip-vit-base-patch32": "open_clip:ViT-B-32-quickgelu@openai",
}
"""OpenAI's CLIPs, whose own repositories may have pickles alone, and the same weights as safetensors."""


def read_config(checkpoint: Checkpoint) -> dict:
    """Read a checkpoint's config.json. Raises ModelError if it is missing, damaged or of another format."""
    source, named, path = checkpoint.source, _named(checkpoint), checkpoint.folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{named} has no config.json; it is not a checkpoint of transformers")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{named} has a config.json that cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{named} has a config.json that is no JSON object")
    if kind := original_format(config):
        raise ModelError(
            f"{source} is in its authors' own format ({kind}), which transformers does not read; use its -hf form, such as "
            f"{_hf_form(source) or ORIGINALS[kind]}"
        )
    check_sizes(source, config)
    return config


def original_format(config: dict) -> str | None:
    """The authors' own format of a config; None: it has transformers' format."""
    if config.get("model_type") in ORIGINALS:
        return config["model_type"]
    names = [str(name) for name in config.get("architectures") or []]
    return next((kind for start, kind in ARCHITECTURES.items() if any(name.startswith(start) for name in names)), None)


def _hf_form(source: str) -> str | None:
    """Name of the conversion of a checkpoint by llava-hf or OpenGVLab."""
    name = source.rstrip("/").rsplit("/", 1)[-1]
    if name.startswith("llava-v1.5-"):
        return f"llava-hf/{name.replace('llava-v1.5', 'llava-1.5')}-hf"
    if name.startswith(("llava-v1.6-", "llava-onevision-")):
        return f"llava-hf/{name}-hf"
    return f"OpenGVLab/{name}-hf" if name.startswith("InternVL3") else None


def check_sizes(source: str, config: dict, where: str = "") -> None:
    """Raise ModelError, naming the entry, for sizes of a config that no model has."""

    def refuse(name: str, must: str) -> None:
        raise ModelError(f"{source}: its config.json has {where}{name}={config[name]!r}, but it must {must}")

    for name, largest in LARGEST.items():
        value = config.get(name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= largest:
                refuse(name, f"be a whole number from 1 to {largest}")
    width, heads, groups = (config.get(name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if width and heads and not config.get("head_dim") and width % heads:
        refuse("hidden_size", f"be a multiple of num_attention_heads={heads}")
    if heads and groups and heads % groups:
        refuse("num_attention_heads", f"be a multiple of num_key_value_heads={groups}")
    image, patch = config.get("image_size"), config.get("patch_size")
    if isinstance(image, int) and isinstance(patch, int) and image < patch:
        refuse("image_size", f"be at least patch_size={patch}")
    for name, part in config.items():
        if isinstance(part, dict):
            check_sizes(source, part, f"{where}{name}.")


def weight_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Safetensors of a checkpoint: the files of the first pattern that matches any."""
    for pattern in patterns:
        if paths := sorted(folder.glob(pattern)):
            return paths
    return []


def check_weight_files(checkpoint: Checkpoint, patterns: Sequence[str] = ANY, library: str = "") -> None:
    """Raise ModelError for a checkpoint without safetensors, naming what it has, or where the same weights are, instead.

    patterns  of the files, the usual one first
    library   prefix of another source in a command
    """
    if weight_files(checkpoint.folder, patterns):
        return
    same, name = AS_SAFETENSORS.get(checkpoint.source), patterns[0]
    fix = f"; the same weights as safetensors: {library}{same}" if same else ""
    if patterns is ANY and not same:
        if checkpoint.commit is None:
            pickles = [p.name for p in checkpoint.folder.iterdir() if p.suffix in PICKLES]
            if not pickles:
                raise ModelError(f"{_named(checkpoint)} has no *.safetensors weights")
            raise ModelError(
                f"{_named(checkpoint)} holds {pickles[0]}, a pickle, which is never opened here; convert it to safetensors "
                "(model.save_pretrained(folder))"
            )
        name = "model.safetensors"
        fix = (
            ": choose a repository with safetensors, or convert it (model.save_pretrained(folder)) and give the folder"
        )
    raise ModelError(f"{checkpoint.source} has no {name}; other formats (pickles) are never opened here{fix}")


def _named(checkpoint: Checkpoint) -> str:
    return checkpoint.source if checkpoint.commit else f"model folder {Path(checkpoint.source)}"


@torch.no_grad()
def check_finite(source: str, model: nn.Module) -> None:
    """Raise ModelError, naming the tensor, for weights with NaN or infinite values.

    One pass over the weights in place, without copies: NaN spreads to the least and greatest value.
    """
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    named = [(name, p) for name, p in model.named_parameters() if p.dtype in kinds and p.numel() and not p.is_meta]
    bounds = [torch.stack(p.aminmax()).double() for _, p in named]
    for (name, _), bound in zip(named, bounds, strict=True):
        if not bound.isfinite().all():
            raise ModelError(
                f"{source}: weight {name} has NaN or infinite values; the checkpoint is damaged, fetch it anew"
            )


def check_device(device: str | int | torch.device) -> None:
    """Raise ModelError, naming the available devices, for a device that is not available."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    numbers = range(torch.accelerator.device_count()) if accelerator else range(0)
    named = ", ".join(["cpu", *(f"{accelerator.type}:{n}" for n in numbers if accelerator)])
    try:
        requested = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"device={device!r} is not a device of torch; here are: {named}") from error
    if requested.type in ("cpu", "meta"):
        return
    if accelerator is None or requested.type != accelerator.type or (requested.index or 0) not in numbers:
        raise ModelError(f"device={str(device)!r} is not here; here are: {named}")
