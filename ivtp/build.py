"""From config to objects: the only module that knows both."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ivtp.backbones.companions import text_checkpoint
from ivtp.backbones.hub import CODE, SMALL, Checkpoint
from ivtp.backbones.image_inputs import limit_crops, padding_of
from ivtp.data.batches import CHAT, Collate, QuestionData
from ivtp.models import load_model, shape_of, source_shape
from ivtp.pruners import PRUNERS, load_pruner
from ivtp.pruners.budget import solve
from ivtp.pruners.planner import Planner
from ivtp.pruning.conventions import resampler
from ivtp.pruning.cost import Cost, Shape, cost
from ivtp.pruning.pruner import Plan
from ivtp.records import fingerprint
from ivtp.registry import UnknownName, UserError, unknown

STAND_INS = {"resampler": resampler}
"""Methods with trained modules of their own: known by their cost alone, never run."""


@dataclass(frozen=True)
class Row:
    """One row of an experiment, planned: what it keeps and what it costs are known before the first image."""

    label: str
    series: str
    section: str
    pruner: dict
    budget: dict
    position_ids: str
    plan: Plan
    cost: Cost
    planner: Planner | None = None
    paper: str | None = None
    stand_in: str | None = None
    seeds_of: str | None = None


def quiet_libraries() -> None:
    """Libraries talk about things that this run does on purpose; warnings of our own and bars of downloads stay."""
    import logging
    import warnings

    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    without_bars = are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of huggingface_hub too
    if not without_bars:
        enable_progress_bars()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def is_encoder(config: DictConfig) -> bool:
    """Whether `config.model` sorts images into classes, instead of answering questions about them."""
    return "library" in config.model


def build_model(config: DictConfig, device: str = "cpu"):
    """Model and processor of `config.model`; of an encoder (`model.library`) itself and how it sorts images."""
    c = config.model
    if is_encoder(config):
        from ivtp.build_images import build_encoder

        encoder = build_encoder(config, device)
        return encoder.model, encoder
    return load_model(
        c.source,
        text_encoder=c.text_encoder,
        dtype=c.dtype,
        device=device,
        revision=c.revision,
        attn_implementation=c.attn_implementation,
        device_map=c.get("device_map"),
        load_in_4bit=c.get("load_in_4bit", False),
        trust_remote_code=c.get("trust_remote_code", False),
        pack=config.trainer.pack,
        image_padding=c.get("image_padding"),
        max_crops=c.get("max_crops"),
    )


def build_shape(config: DictConfig) -> Shape:
    """The sizes of `config.model` without its weights: from the config's own `config`, else from the checkpoint's."""
    from transformers import AutoConfig

    quiet_libraries()
    if is_encoder(config):
        from ivtp.build_images import build_encoder_shape

        return build_encoder_shape(config)
    c = config.model
    settings = OmegaConf.to_container(c.get("config") or OmegaConf.create({}))
    crops = c.get("max_crops")
    if not settings:
        return source_shape(c.source, c.text_encoder, c.revision, usual_image(config), crops)
    model = AutoConfig.for_model(**settings)
    if crops is not None:
        limit_crops(model, crops)
    return shape_of(model, usual_image(config))


def usual_image(config: DictConfig) -> tuple[int, int] | None:
    """Height and width of the image that budgets and cost are worked out for, where the model reads several sizes."""
    image = config.model.get("image")
    if image is None:
        return None
    if len(image) != 2 or not all(isinstance(side, int) and side > 0 for side in image):
        raise UserError(f"model.image={list(image)} must be a height and a width in pixels, as in [672,672]")
    return image[0], image[1]


def context_of(model) -> int | None:
    """The most positions that the language model was made for, as its config states them; None where it states none."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    stated = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    factor, trained = rope.get("factor"), rope.get("original_max_position_embeddings") or stated
    if not stated or not factor:
        return stated
    return max(stated, round(factor * trained))  # some configs state the length before RoPE was stretched


def build_data(
    config: DictConfig, processor, shape: Shape, batch_size: int, context: int | None = None
) -> QuestionData:
    """The data module of `config.data`; longer prompts than `context` are refused."""
    c = config.data
    if is_encoder(config):
        from ivtp.build_images import build_images

        return build_images(config, processor, shape, batch_size)
    if c.name == "scenes2":
        from ivtp.data.scenes2 import Scenes2

        try:
            data = Scenes2(c.split, c.scenes, c.seed, c.size, square_grid(shape))
        except ValueError as error:
            raise UserError(f"data: {error}") from error
    elif c.name == "folder":
        from ivtp.data.questions import Questions

        data = Questions(c.path, shape.patches, c.match, c.answers)
    elif c.name == "lmms":
        from ivtp.data.lmms import LmmsTask

        asked = OmegaConf.to_container(c)
        name, _ = asked.pop("task"), asked.pop("name")
        data = LmmsTask(name, shape.patches, chat=config.model.prompt == CHAT, **asked)
    else:
        raise UserError(
            f"data={c.name} asks nothing, but this model answers questions: data=scenes2, folder, lmms; labelled "
            "images are for encoders (model=tiny_clip, deit_small, …)"
        )
    collate, sort = Collate(processor, config.model.prompt, context), config.trainer.sort
    return QuestionData(data, collate, batch_size, c.limit, sort, shape.by_image)


def square_grid(shape: Shape) -> int:
    """Patches on a side of the square that a tower cuts an image into."""
    side = isqrt(shape.patches)
    if side == 0 or side * side != shape.patches:
        raise UserError(
            f"data=scenes2 needs a model that cuts its images into a square of patches, not {shape.patches}"
        )
    return side


def prompt_of(config: DictConfig) -> str:
    """What is put around a question; of an encoder that reads class names, around those."""
    return config.model.get("prompt") or " | ".join(config.model.get("templates") or ())


def plan_rows(rows: list[dict], shape: Shape, text: int, instruction: int) -> list[Row]:
    """Plan every row; raises UserError, naming the row, for a budget or setting that cannot be met.

    text, instruction  tokens of a prompt around the image, and of the instruction in the CLIP text encoder
    """
    planned: dict[str, Row] = {}
    for row in rows:
        if row.get("stand_in") not in (None, *STAND_INS):
            raise UnknownName(unknown(f"stand_in of row {row['label']!r}:", row["stand_in"], STAND_INS))
        settings = {key: value for key, value in row["pruner"].items() if key != "name"}
        name = row["pruner"]["name"]

        def build(keep: int | None, name=name, settings=settings, row=row) -> Plan:
            given = {} if keep is None else {"keep": keep}
            return load_pruner(name, shape, row["position_ids"], row["budget"].get("per", "image"), **settings, **given)

        def spend(keep: int | None, build=build) -> Cost:
            return cost(shape, build(keep), text, instruction)

        try:
            keep = None
            if row.get("stand_in"):
                stand_in = STAND_INS[row["stand_in"]]
                keep = solve(row["budget"], shape, lambda keep, of=stand_in: of(shape, keep, text)[1])
                plan, spent = stand_in(shape, keep, text)
                planned[row["label"]] = Row(**row, plan=plan, cost=spent)
                continue
            if "keep" in inspect.signature(PRUNERS[name]).parameters:
                keep = solve(row["budget"], shape, spend, {label: other.cost for label, other in planned.items()})
            plan = build(keep)
            spent = cost(shape, plan, text, instruction)
        except ValueError as error:
            raise UserError(f"row {row['label']!r}: {error}") from error
        pruner = row["pruner"] | ({} if keep is None else {"keep": keep})
        planner = planner_of(row, shape, settings, keep)
        planned[row["label"]] = Row(**{**row, "pruner": pruner}, plan=plan, cost=spent, planner=planner)
    return list(planned.values())


def planner_of(row: dict, shape: Shape, settings: dict, keep: int | None) -> Planner:
    """The row for images of any size: a budget of tokens counts them in each, all others fix their share."""
    per = row["budget"].get("per", "image")
    settings = settings | {"position_ids": row["position_ids"], "per": per}
    if keep is not None:
        settings["keep"] = keep
    counts = keep is None or not shape.by_image or "keep" in row["budget"]
    return Planner(row["pruner"]["name"], shape, settings, None if counts else keep / shape.tokens)


def model_identity(config: DictConfig, model, processor) -> dict:
    """Source of the model, a hash of its files or its commit on the hub, its type, and how its processor makes images
    square or limits their crops."""
    checkpoint = getattr(model, "_checkpoint", None)  # None: random weights
    dtype = str(getattr(model, "dtype", None) or next(model.parameters()).dtype).removeprefix("torch.")
    more = {name: config.model[name] for name in ("library", "pretrained", "neighbours") if name in config.model}
    images = {"image_padding": padding_of(processor.image_processor), "max_crops": config.model.get("max_crops")}
    more |= {name: value for name, value in images.items() if value is not None and not is_encoder(config)}
    found = None if checkpoint is None else checkpoint_hash(checkpoint)
    return {"source": str(config.model.source), "hash": found, "dtype": dtype} | more


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    """The commit of a checkpoint on the hub, or a hash of the files of its folder that loading may read."""
    if checkpoint.commit is not None:
        return checkpoint.commit
    patterns = (*SMALL, *CODE, "*.safetensors")
    return fingerprint([p for pattern in patterns for p in checkpoint.folder.rglob(pattern) if p.is_file()])


def reads_text(row: Row) -> bool:
    """Whether a row's method asks the text encoder."""
    return row.plan.reads_clip or row.plan.reads_relevance


def text_identity(model, rows: list[Row]) -> dict | None:
    """Source of the model's text encoder, and a hash of its files or its commit; None where no row reads it.

    Fetches the encoder if it is not here yet, so that what is wrong with it is said before the first sample.
    """
    checkpoint = text_checkpoint(model) if any(map(reads_text, rows)) else None
    if checkpoint is None:
        return None
    return {"source": checkpoint.source, "hash": checkpoint_hash(checkpoint)}


def pruner_source(name: str) -> str | None:
    """A hash of the source of a pruner of somebody else's; None for one of this package, whose code is hashed as a whole.

    Covers the pruner's package, or for a single file those of its imports that lie beside it.
    """
    function = inspect.unwrap(PRUNERS[name])
    top = function.__module__.partition(".")[0]
    if top == __package__.partition(".")[0]:
        return None
    path = Path(inspect.getsourcefile(function) or "")
    if not path.is_file():
        raise UserError(
            f"pruner {name!r} was defined in a session, and a result cannot be tied to its source; put it into a file"
        )
    folders = getattr(sys.modules[top], "__path__", None)
    if folders is not None:
        return fingerprint([file for folder in folders for file in Path(folder).rglob("*.py")])
    beside = {getattr(module, "__file__", None) for module in list(sys.modules.values())} - {None}
    files = {path, *(Path(file) for file in beside if Path(file).parent == path.parent)}
    return fingerprint([path] if "site-packages" in path.parts else sorted(files))
