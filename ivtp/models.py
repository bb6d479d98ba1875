"""Load a model, prune a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from threading import Lock

from torch import Tensor, nn

from ivtp.backbones import LANGUAGE, ModelError, family, unwrapped
from ivtp.backbones.checkpoints import check_device, check_finite, check_weight_files, read_config
from ivtp.backbones.guidance import TextEncoder
from ivtp.backbones.hub import CODE, SMALL, WEIGHTS, fetch, one_line, with_files
from ivtp.backbones.image_inputs import configure, limit_crops, warn_if_cropped
from ivtp.backbones.shared import SharedVision
from ivtp.pruners.planner import Fixed, Planner
from ivtp.pruners.sites import part1_layers
from ivtp.pruning.cost import Shape
from ivtp.pruning.pruner import Plan
from ivtp.registry import UserError

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = {"tiny": ASSETS / "tiny"}


def load_model(
    source: str | Path | nn.Module,
    processor=None,
    text_encoder: str | Path | TextEncoder | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    attn_implementation: str | None = None,
    device_map: str | dict | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    pack: bool = False,
    image_padding: str | None = None,
    max_crops: int | None = None,
):
    """A frozen model and its processor, ready for `prune`.

    source        "tiny" (embedded), a folder, a hub id (`owner/name` or `owner/name@revision`), or a model that you already
                  have (then give its processor)
    text_encoder  the CLIP text encoder paired with the vision tower: a folder or hub id in transformers' or open_clip's
                  format, "open_clip:NAME@TAG" (each may end in @revision), or a `guidance.TextEncoder` of your own;
                  default: the folder `clip` inside the checkpoint, or the CLIP that the tower is known to come from. It
                  is loaded only when a plan asks for it, its text half alone.
    device_map    accelerate's: where each part of the model goes, in place of `device`
    load_in_4bit  weights in 4 bits (NF4) by bitsandbytes; they stay where they are loaded
    trust_remote_code  run code that comes with a checkpoint; never unless asked
    pack          on a CPU, in float32: lay the weights of linear layers out once as its kernels read them (also of a model
                  that you give): products of few tokens are then as fast per token as those of many
    image_padding  how a processor that crops images to a square (CLIPImageProcessor) makes them square: "pad" with its
                  mean colour, as LLaVA-1.5 was trained and is evaluated, or "crop" at the centre; default: as the checkpoint
                  has it. A warning says so if a LLaVA checkpoint crops by default.
    max_crops     the most crops that an image is cut into besides the whole (LLaVA-NeXT, LLaVA-OneVision); default: as the
                  checkpoint has it. LLaVA-OneVision interpolates the features of images of more than N crops, which a
                  tower cannot prune: with max_crops=N there are none (N=9 for `anyres_max_9`, the published ones).
    Both settings change the processor (and `max_crops` the model's config) in place, also those that you give; each call
    starts from all grids of the checkpoint, so that one without `max_crops` lifts an earlier limit.
    Raises ModelError, in one line, for what is missing, truncated, or not stored as safetensors.
    """
    from ivtp.backbones.companions import accompany, as_text_encoder, crop_limit_of

    check_device(device)
    text_encoder = as_text_encoder(text_encoder)
    if isinstance(source, nn.Module):
        model = source
        where = getattr(source, "name_or_path", "") or ""
    else:
        where = str(EMBEDDED.get(str(source), source))
        placed = _placed(device, device_map, load_in_4bit)
        more = placed | ({"attn_implementation": attn_implementation} if attn_implementation else {})
        model, found, where = _from_pretrained(where, dtype, revision, trust_remote_code, more)
        if processor is None and image_padding is None and str(source) not in EMBEDDED:
            warn_if_cropped(str(source), model, found)
        processor = processor or found
    from ivtp.backbones import packed

    model = model.eval().requires_grad_(False)
    if isinstance(source, nn.Module) or not placed:
        model = model.to(device)
    check_finite(str(source) if isinstance(source, (str, Path)) else type(source).__name__, model)
    if pack:
        packed.pack(model)
    limit = configure(model, processor, image_padding, max_crops, crop_limit_of(unwrapped(model)))
    accompany(unwrapped(model), processor, text_encoder or _clip_inside(where), pack, limit)
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

    code = CODE if trust_remote_code else []
    checkpoint, config = _config(where, revision, trust_remote_code)
    checkpoint = with_files(checkpoint, [*SMALL, *code, *WEIGHTS, "clip/model.safetensors"])
    check_weight_files(checkpoint)
    with one_line(where):
        model, info = AutoModelForImageTextToText.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **more,
        )
        processor = AutoProcessor.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    if info["missing_keys"]:
        raise ModelError(f"{where} lacks weights, e.g. {sorted(info['missing_keys'])[0]}; the checkpoint is incomplete")
    model._checkpoint = checkpoint  # so that a record can say it
    return model, processor, checkpoint.folder


def _config(where: str, revision: str | None, trust_remote_code: bool = False):
    """The small files of a checkpoint and its config, if it is of a supported language-vision family."""
    from transformers import AutoConfig

    checkpoint = fetch(where, revision, [*SMALL, *(CODE if trust_remote_code else [])])
    read_config(checkpoint)
    if checkpoint.commit is None:
        check_weight_files(checkpoint)
    with one_line(where):
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    if config.model_type not in LANGUAGE:
        raise ModelError(f"{where} is a {config.model_type!r} model; supported: {', '.join(LANGUAGE)}")
    return checkpoint, config


def _clip_inside(folder: str | Path) -> str | None:
    """The CLIP text encoder that a checkpoint folder brings along."""
    return str(Path(folder) / "clip") if (Path(folder) / "clip").is_dir() else None


def shape_of(model, image: tuple[int, int] | None = None) -> Shape:
    """The sizes that pruning and cost depend on, of a model or of a transformers config.

    image  height and width in pixels of an image, for families whose number of tokens depends on it; None: a usual one

    >>> from transformers import LlavaConfig
    >>> shape = shape_of(LlavaConfig())
    >>> shape.tokens, shape.vision.depth, shape.language.depth
    (576, 24, 32)
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
    source: str,
    text_encoder: str | None = None,
    revision: str | None = None,
    image: tuple[int, int] | None = None,
    max_crops: int | None = None,
) -> Shape:
    """The same of a checkpoint, from its configs alone: no weights are read."""
    from ivtp.backbones.companions import text_sizes

    where = str(EMBEDDED.get(str(source), source))
    checkpoint, config = _config(where, revision)
    if max_crops is not None:
        limit_crops(config, max_crops)
    return replace(shape_of(config, image), **text_sizes(config, text_encoder or _clip_inside(checkpoint.folder)))


def prune(
    model: nn.Module,
    pruner: str | Plan | None = "ivtp",
    *,
    instruction: str | Sequence[str] | None = None,
    read_early: bool = False,
    part: Callable[[str], AbstractContextManager] = nullcontext,
    shared: SharedVision | None = None,
    truth: Tensor | None = None,
    **settings,
) -> Pruning:
    """Within the context `model` runs pruned: its own forward, and transformers' own `generate`.

    pruner       a name from `list_pruners()`, with its settings (`keep=16`, `group=3`, `tau=0.2`, …), or a Plan; None: all
                 tokens stay
    instruction  the part of each prompt that guidance reads (the question); default: all text of the prompt
    read_early   also read the answer out after part 1 (`run.trace.early`)
    shared       keeps what the vision tower of this model answers for other plans that prune it alike
    truth        for oracles: "b v", True on the patches that each prompt asks about
    Yields a run whose `trace` tells which tokens each cut of the last prefill (of this thread, if it ran any) kept. On
    exit, by an exception too, the model is what it was before; a copy or a pickle of the model is never pruned.

    Contexts on one model nest: the innermost holds. A thread runs under the innermost context that it opened itself; a
    thread that opened none, under that of the thread whose context was opened first. One model serves one call at a time.
    """
    return Pruning(partial(_prune, model, pruner, instruction, read_early, part, shared, truth, settings))


class Pruning(ContextDecorator):
    """The context of one call of `prune`; it is entered once."""

    def __init__(self, make: Callable[[], AbstractContextManager]) -> None:
        self._make, self._context = make, None

    def _recreate_cm(self) -> Pruning:
        return Pruning(self._make)

    def __enter__(self):
        if self._context is not None:
            raise UserError("this context was entered before, and each is entered once; call ivtp.prune(...) again")
        self._context = self._make()
        return self._context.__enter__()

    def __exit__(self, *error) -> bool | None:
        return self._context.__exit__(*error)


_opening = Lock()
"""Contexts open one by one: the first may load a text encoder, which transformers cannot do in two threads at once."""


@contextmanager
def _prune(model, pruner, instruction, read_early, part, shared, truth, settings) -> Iterator:
    model = unwrapped(model)
    shape = shape_of(model)
    if pruner is None:
        pruner = "none"
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
    with ExitStack() as stack:
        with _opening:
            run = stack.enter_context(family(model).prune(model, given, instruction, read_at, part, **more))
        yield run
