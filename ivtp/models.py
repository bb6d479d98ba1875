"""Load a model, prune a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

from torch import Tensor, nn

from ivtp.backbones import LANGUAGE, ModelError, family, one_line, unwrapped
from ivtp.backbones.shared import SharedVision
from ivtp.pruners.planner import Fixed, Planner
from ivtp.pruners.sites import part1_layers
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = {"tiny": ASSETS / "tiny"}


def load_model(
    source: str | Path | nn.Module,
    processor=None,
    text_encoder=None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    attn_implementation: str | None = None,
    device_map: str | dict | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    pack: bool = False,
):
    """A frozen model and its processor, ready for `prune`.

    source        "tiny" (embedded), a folder, a hub id, or a model that you already have (then give its processor)
    text_encoder  the CLIP text encoder paired with the vision tower: a folder or hub id, "open_clip:NAME@PRETRAINED",
                  or an object with `encode` and `project`; default: the folder `clip` inside the checkpoint, or the
                  CLIP that the tower is known to come from. It is loaded only when a plan asks for it.
    device_map    accelerate's: where each part of the model goes, in place of `device`
    load_in_4bit  weights in 4 bits (NF4) by bitsandbytes; they stay where they are loaded
    trust_remote_code  run code that comes with a checkpoint; never unless asked
    pack          on a CPU, in float32: lay the weights of linear layers out once as its kernels read them (also of a model
                  that you give): products of few tokens are then as fast per token as those of many
    Raises ModelError, in one line, for what is missing, truncated, or not stored as safetensors.
    """
    if isinstance(source, nn.Module):
        model = source
        where = getattr(source, "name_or_path", "") or ""
    else:
        where = str(EMBEDDED.get(str(source), source))
        placed = _placed(device, device_map, load_in_4bit)
        more = placed | ({"attn_implementation": attn_implementation} if attn_implementation else {})
        model, found = _from_pretrained(where, dtype, revision, trust_remote_code, more)
        processor = processor or found
    from ivtp.backbones import packed
    from ivtp.backbones.companions import accompany

    model = model.eval().requires_grad_(False)
    if isinstance(source, nn.Module) or not placed:
        model = model.to(device)
    if pack:
        packed.pack(model)
    accompany(unwrapped(model), processor, text_encoder or _clip_inside(where), pack)
    return model, processor


def _placed(device: str, device_map: str | dict | None, load_in_4bit: bool) -> dict:
    """What tells transformers where weights go and how they are stored, if it has to know."""
    if load_in_4bit:
        if find_spec("bitsandbytes") is None:
            raise ModelError("4-bit weights need bitsandbytes: pip install bitsandbytes, or leave load_in_4bit out")
        from transformers import BitsAndBytesConfig

        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return {"quantization_config": quantised, "device_map": device_map or {"": device}}
    return {} if device_map is None else {"device_map": device_map}


def _from_pretrained(where: str, dtype: str, revision: str | None, trust_remote_code: bool, more: dict):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _config(where, revision, trust_remote_code)
    given = {"revision": revision, "trust_remote_code": trust_remote_code}
    with one_line(where):
        model, info = AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype, use_safetensors=True, output_loading_info=True, **given, **more
        )
        processor = AutoProcessor.from_pretrained(where, **given)
    if info["missing_keys"]:
        raise ModelError(f"{where} lacks weights, e.g. {sorted(info['missing_keys'])[0]}; the checkpoint is incomplete")
    return model, processor


def _config(where: str, revision: str | None, trust_remote_code: bool = False):
    """The config of a checkpoint of a supported language-vision family."""
    from transformers import AutoConfig

    folder = Path(where)
    if folder.is_absolute() or where.startswith(("./", "../")) or folder.exists():
        _check_folder(folder)
    with one_line(where):
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    if config.model_type not in LANGUAGE:
        raise ModelError(f"{where} is a {config.model_type!r} model; supported: {', '.join(LANGUAGE)}")
    return config


def _clip_inside(where: str) -> str | None:
    """The CLIP text encoder that a checkpoint folder brings along."""
    return str(Path(where) / "clip") if (Path(where) / "clip").is_dir() else None


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist; give a folder with config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json; it is not a checkpoint of transformers")
    if not list(folder.glob("*.safetensors")):
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        if pickles:
            raise ModelError(
                f"model folder {folder} holds {pickles[0]}, a pickle, which is never opened here; "
                "convert it to safetensors (model.save_pretrained(folder, safe_serialization=True))"
            )
        raise ModelError(f"model folder {folder} has no *.safetensors weights")


def shape_of(model, image: tuple[int, int] | None = None) -> Shape:
    """The sizes that pruning and cost depend on, of a model or of a transformers config.

    image  height and width in pixels of an image, for families whose number of tokens depends on it; None: a usual one
    """
    model = unwrapped(model)
    shape = family(model).shape
    if image is None:
        return shape(model)
    if "image" not in signature(shape).parameters:
        raise ModelError(
            f"image={list(image)}, but every image has the same number of tokens in this model; leave it out"
        )
    return shape(model, image)


def source_shape(
    source: str, text_encoder: str | None = None, revision: str | None = None, image: tuple[int, int] | None = None
) -> Shape:
    """The same of a checkpoint, from its configs alone: no weights are read."""
    from ivtp.backbones.companions import text_sizes

    where = str(EMBEDDED.get(str(source), source))
    config = _config(where, revision)
    return replace(shape_of(config, image), **text_sizes(config, text_encoder or _clip_inside(where)))


@contextmanager
def prune(
    model: nn.Module,
    pruner: str | Plan = "ivtp",
    *,
    instruction: str | Sequence[str] | None = None,
    read_early: bool = False,
    part: Callable[[str], AbstractContextManager] = nullcontext,
    shared: SharedVision | None = None,
    truth: Tensor | None = None,
    **settings,
) -> Iterator:
    """Within the context `model` runs pruned: its own forward, and transformers' own `generate`.

    pruner       a name from `list_pruners()`, with its settings (`keep=16`, `group=3`, `tau=0.2`, …), or a Plan
    instruction  the part of each prompt that guidance reads (the question); default: all text of the prompt
    read_early   also read the answer out after part 1 (`run.trace.early`)
    shared       keeps what the vision tower of this model answers for other plans that prune it alike
    truth        for oracles: "b v", True on the patches that each prompt asks about
    Yields a run whose `trace` tells which tokens each cut of the last prefill kept. On exit, by an exception too, the
    model is what it was before.
    """
    model = unwrapped(model)
    shape = shape_of(model)
    if isinstance(pruner, str):
        pruner = Planner(pruner, shape, settings)
    elif isinstance(pruner, Plan):
        pruner = Fixed(pruner)
    plan = pruner.outline
    read_at = part1_layers(shape) if read_early else 0
    if plan.language is not None and read_early:
        read_at = plan.part1 or read_at
    more = {name: value for name, value in (("shared", shared), ("truth", truth)) if value is not None}
    # A tower alone has one size of images; a model that reads several asks for a plan for each.
    given = plan if shape.language is None else pruner
    with family(model).prune(model, given, instruction, read_at, part, **more) as run:
        yield run
