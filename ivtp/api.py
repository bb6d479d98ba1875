"""Load a model, prune a model."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor, nn

from ivtp.backbones.family import ModelError, PruneOptions, family_of, language_families, shape_of, unwrapped
from ivtp.backbones.loading.checks import check_device, check_finite, check_weight_files, read_config
from ivtp.backbones.loading.hub import CODE, EMBEDDED, SMALL, WEIGHTS, fetch, one_line, straight_to, with_files
from ivtp.backbones.loading.image_inputs import configure, limit_crops, limit_pixels, warn_if_cropped
from ivtp.backbones.text.encoders import TextEncoder
from ivtp.backbones.vlm.vision_cache import VisionCache
from ivtp.core.flops import Shape
from ivtp.core.plan import Plan
from ivtp.pruners.planner import Fixed, Planner
from ivtp.registry import UserError


def load_model(
    source: str | Path | nn.Module,
    processor=None,
    text_encoder: str | Path | TextEncoder | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    device_map: str | dict | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    pack: bool = False,
    image_padding: str | None = None,
    max_crops: int | None = None,
    max_pixels: int | None = None,
):
    """Load a frozen model and its processor, ready for `prune`.

    source        "tiny" (embedded), a folder, a hub id (`owner/name` or `owner/name@revision`), or a model that you already
                  have (then give its processor)
    text_encoder  the CLIP text encoder paired with the vision tower: a folder or hub id in transformers' or open_clip's
                  format, "open_clip:NAME@TAG" (each may end in @revision), or a `TextEncoder` of your own;
                  default: the folder `clip` inside the checkpoint, or the CLIP that the tower is known to come from. It
                  is loaded only when a plan needs it, its text half alone.
    device        default: the CPU; a model that you give stays where it is
    device_map    accelerate's: the device of each part of the model, in place of `device`
    load_in_4bit  weights in 4 bits (NF4) by bitsandbytes; they stay where they are loaded
    trust_remote_code  run code that comes with a checkpoint; never unless asked
    pack          on a CPU, in float32: lay the weights of linear layers out once as its kernels read them (also of a model
                  that you give). Products of few tokens are then as fast per token as those of many
    image_padding  how a processor that crops images to a square (CLIPImageProcessor) makes them square: "pad" with its
                  mean colour, as LLaVA-1.5 was trained and is evaluated, or "crop" at the centre; default: as the checkpoint
                  has it. A warning says so if a LLaVA checkpoint crops by default.
    max_crops     the most crops that an image is cut into besides the whole (LLaVA-NeXT, LLaVA-OneVision); default: as the
                  checkpoint has it. LLaVA-OneVision interpolates the features of images of more than N crops, which a
                  tower cannot prune: with max_crops=N there are none (N=9 for `anyres_max_9`, the published ones).
    max_pixels    the most pixels of an image (Qwen2.5-VL, Qwen3-VL): larger ones are made smaller; default: as the checkpoint
                  has it, or as an earlier call set it
    These settings change the processor (and `max_crops` the model's config) in place, also those that you give; each call
    starts from all grids of the checkpoint, so that one without `max_crops` lifts an earlier limit.
    Raises ModelError, in one line, for what is missing, truncated, or not stored as safetensors.
    """
    from ivtp.backbones.hooks.packed_linear import pack as pack_linears
    from ivtp.backbones.text.pairing import as_text_encoder, attach, crop_limit_of

    place = "cpu" if device is None else device
    check_device(place)
    text_encoder = as_text_encoder(text_encoder)
    model: Any = source
    if isinstance(source, nn.Module):
        where = getattr(source, "name_or_path", "") or ""
    else:
        where = str(EMBEDDED.get(str(source), source))
        placement = _placement(place, device_map, load_in_4bit)
        settings = placement | ({"attn_implementation": attn_implementation} if attn_implementation else {})
        model, own_processor, where = _from_pretrained(where, dtype, revision, trust_remote_code, settings)
        if processor is None and image_padding is None and str(source) not in EMBEDDED:
            warn_if_cropped(str(source), model, own_processor)
        processor = processor or own_processor
    model = model.eval().requires_grad_(False)
    if device is not None and (isinstance(source, nn.Module) or not placement):
        model = model.to(device)
    check_finite(str(source) if isinstance(source, (str, Path)) else type(source).__name__, model)
    if pack:
        pack_linears(model)
    limit = configure(model, processor, image_padding, max_crops, crop_limit_of(unwrapped(model)))
    if max_pixels is not None:
        limit_pixels(model.config, getattr(processor, "image_processor", None), max_pixels)
    attach(unwrapped(model), processor, text_encoder or _clip_inside(where), pack, limit)
    return model, processor


def _placement(device: str, device_map: str | dict | None, load_in_4bit: bool) -> dict:
    """Extra `from_pretrained` arguments for placement and quantisation."""
    if load_in_4bit:
        if find_spec("bitsandbytes") is None:
            raise ModelError("4-bit weights need bitsandbytes: pip install bitsandbytes, or leave load_in_4bit out")
        from transformers import BitsAndBytesConfig

        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return {"quantization_config": quantised, "device_map": device_map or {"": device}}
    return straight_to(device) if device_map is None else {"device_map": device_map}


def _from_pretrained(where: str, dtype: str, revision: str | None, trust_remote_code: bool, settings: dict):
    """Load model and processor of a checkpoint; returns its folder too."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    code = CODE if trust_remote_code else []
    checkpoint, config = _config(where, revision, trust_remote_code)
    checkpoint = with_files(checkpoint, [*SMALL, *code, *WEIGHTS, "clip/model.safetensors"])
    check_weight_files(checkpoint)
    loaded: Any
    with one_line(where):
        loaded = AutoModelForImageTextToText.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **settings,
        )
        processor = AutoProcessor.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(f"{where} lacks weights, e.g. {sorted(info['missing_keys'])[0]}; the checkpoint is incomplete")
    model._checkpoint = checkpoint  # for the record of a run
    return model, processor, checkpoint.folder


def _config(where: str, revision: str | None, trust_remote_code: bool = False):
    """Fetch the small files of a checkpoint and read its config; raise ModelError if its family is not supported."""
    from transformers import AutoConfig

    checkpoint = fetch(where, revision, [*SMALL, *(CODE if trust_remote_code else [])])
    read_config(checkpoint)
    if checkpoint.commit is None:
        check_weight_files(checkpoint)
    with one_line(where):
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    supported = language_families()
    if config.model_type not in supported:
        raise ModelError(f"{where} is a {config.model_type!r} model; supported: {', '.join(supported)}")
    return checkpoint, config


def _clip_inside(folder: str | Path) -> str | None:
    """Folder of the CLIP text encoder inside a checkpoint folder, if there is one."""
    return str(Path(folder) / "clip") if (Path(folder) / "clip").is_dir() else None


def source_shape(
    source: str,
    text_encoder: str | None = None,
    revision: str | None = None,
    image: tuple[int, int] | None = None,
    max_crops: int | None = None,
) -> Shape:
    """Sizes of a checkpoint, from its configs alone; no weights are read. Arguments: see `load_model` and `shape_of`."""
    from ivtp.backbones.text.pairing import text_sizes

    where = str(EMBEDDED.get(str(source), source))
    checkpoint, config = _config(where, revision)
    if max_crops is not None:
        limit_crops(config, max_crops)
    return replace(shape_of(config, image), **text_sizes(config, text_encoder or _clip_inside(checkpoint.folder)))


_opening = Lock()
"""Held while a context opens: the first may load a text encoder, which transformers cannot do in two threads at once."""


@dataclass(eq=False)
class Pruning(ContextDecorator):
    """The context of one call of `prune`, which is entered once."""

    model: nn.Module
    pruner: str | Plan | None
    settings: dict
    options: PruneOptions
    _context: Any = None

    def _recreate_cm(self):
        return replace(self, _context=None)

    def __enter__(self):
        if self._context is not None:
            raise UserError("this context was entered before, and each is entered once; call ivtp.prune(...) again")
        model: Any = unwrapped(self.model)
        shape, planner = shape_of(model), "none" if self.pruner is None else self.pruner
        if isinstance(planner, str):
            planner = Planner(planner, shape, self.settings)
        elif isinstance(planner, Plan):
            planner = Fixed(planner)
        with _opening:
            self._context = family_of(model).prune(model, planner, self.options)
            return self._context.__enter__()

    def __exit__(self, *error) -> bool | None:
        return self._context.__exit__(*error)


RENAMED = {"shared": "vision_cache", "truth": "target_patches"}
"""Arguments of `prune` under the names that they had before; accepted for one version."""


def prune(
    model: nn.Module,
    pruner: str | Plan | None = "ivtp",
    *,
    instruction: str | Sequence[str] | None = None,
    read_early: bool = False,
    part: Callable[[str], AbstractContextManager] = nullcontext,
    vision_cache: VisionCache | None = None,
    target_patches: Tensor | None = None,
    **settings,
) -> Pruning:
    """Prune a model inside a context: its own forward, and transformers' own `generate`, run pruned.

    pruner       a name from `list_pruners()`, with its settings (`keep=16`, `group=3`, `tau=0.2`, …), or a Plan; None: all
                 tokens stay
    instruction  the part of each prompt that guidance reads (the question); default: all text of the prompt
    read_early   also read the answer out after part 1 (`run.trace.early`)
    part         context manager that is entered around each part of the work: "vision", "projector", "text_encoder",
                 "language", "pruner"
    vision_cache keeps the outputs of this model's vision tower for other plans with the same vision stage
    target_patches  for oracles: "b v", True on the patches that show what each prompt asks about
    Yields a run whose `trace` holds the tokens that each cut of the last prefill (of this thread, if it ran any) kept. On
    exit, by an exception too, the model is what it was before; a copy or a pickle of the model is never pruned.

    Contexts on one model nest: the innermost holds. A thread runs under the innermost context that it opened itself; a
    thread that opened none, under that of the thread whose context was opened first. One model serves one call at a time.
    """
    options = PruneOptions(instruction, read_early, part, vision_cache, target_patches)
    for name in RENAMED.keys() & settings.keys():
        warnings.warn(f"{name}= of ivtp.prune is now {RENAMED[name]}=", DeprecationWarning, stacklevel=2)
        options = replace(options, **{RENAMED[name]: settings.pop(name)})
    return Pruning(model, pruner, settings, options)
