"""Checks of a checkpoint before and after its weights are read: its format, its sizes, its numbers, its device."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from ivtp.backbones import ModelError
from ivtp.backbones.hub import Checkpoint

ORIGINALS = {
    "llava_llama": "llava-hf/llava-1.5-7b-hf",
    "llava_mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_qwen": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl_chat": "OpenGVLab/InternVL3-8B-hf",
}
"""Formats of the authors' own code, which transformers does not read, and a checkpoint of each in its form."""

ARCHITECTURES = {"LlavaLlama": "llava_llama", "LlavaMistral": "llava_mistral", "LlavaQwen": "llava_qwen"}
ARCHITECTURES |= {"InternVLChat": "internvl_chat"}

LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "head_dim", "patch_size"), 10_000),
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "image_size"), 1_000_000),
    "vocab_size": 100_000_000,
}
"""Sizes in a config and a bound that no model comes near; beyond it building the model would never end."""


def read_config(checkpoint: Checkpoint) -> dict:
    """A checkpoint's config.json as it stands. Raises ModelError if it is missing, damaged or of another format."""
    source, path = checkpoint.source, checkpoint.folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{_named(checkpoint)} has no config.json; it is not a checkpoint of transformers")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{_named(checkpoint)} has a config.json that cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{_named(checkpoint)} has a config.json that is no JSON object")
    kind = original_format(config)
    if kind:
        raise ModelError(
            f"{source} is in its authors' own format ({kind}), which transformers does not read; use its -hf form, such as "
            f"{_hf_form(source) or ORIGINALS[kind]}"
        )
    check_sizes(source, config)
    return config


def original_format(config: dict) -> str | None:
    """The authors' own format that a config is of, if it is."""
    if config.get("model_type") in ORIGINALS:
        return config["model_type"]
    names = [str(name) for name in config.get("architectures") or []]
    return next((kind for start, kind in ARCHITECTURES.items() if any(name.startswith(start) for name in names)), None)


def _hf_form(source: str) -> str | None:
    """The name that llava-hf and OpenGVLab gave to their conversion of a checkpoint."""
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


def check_weight_files(checkpoint: Checkpoint) -> None:
    """Raise ModelError where a checkpoint has no safetensors, saying what it has instead."""
    if any(checkpoint.folder.glob("*.safetensors")):
        return
    if checkpoint.commit is not None:  # pickles were not even fetched
        raise ModelError(
            f"{checkpoint.source} has no model.safetensors; other formats (pickles) are never opened here: choose a "
            "repository with safetensors, or convert it (model.save_pretrained(folder)) and give the folder"
        )
    pickles = [p.name for p in checkpoint.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    if pickles:
        raise ModelError(
            f"{_named(checkpoint)} holds {pickles[0]}, a pickle, which is never opened here; convert it to safetensors "
            "(model.save_pretrained(folder))"
        )
    raise ModelError(f"{_named(checkpoint)} has no *.safetensors weights")


def _named(checkpoint: Checkpoint) -> str:
    return checkpoint.source if checkpoint.commit else f"model folder {Path(checkpoint.source)}"


@torch.no_grad()
def check_finite(source: str, model: nn.Module) -> None:
    """Raise ModelError, naming the tensor, for weights with NaN or infinite values.

    One pass over the weights where they are (least and greatest value, which NaN spreads to), without copies.
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
    """Raise ModelError, naming the devices that there are, for one that is not here."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    numbers = range(torch.accelerator.device_count()) if accelerator else ()
    named = ", ".join(["cpu", *(f"{accelerator.type}:{number}" for number in numbers)])
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"device={device!r} is not a device of torch; here are: {named}") from error
    if wanted.type in ("cpu", "meta"):
        return
    if accelerator is None or wanted.type != accelerator.type or (wanted.index or 0) not in numbers:
        raise ModelError(f"device={str(device)!r} is not here; here are: {named}")
