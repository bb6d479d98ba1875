"""From config to objects: the only module that knows both."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ivtp.data.batches import CHAT, Collate, QuestionData
from ivtp.encoders import EMBEDDED_ENCODERS
from ivtp.models import EMBEDDED, load_model, shape_of, source_shape
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
    """Libraries talk about things that this run does on purpose; warnings of our own stay."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
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
    if settings:
        return shape_of(AutoConfig.for_model(**settings), usual_image(config))
    return source_shape(c.source, c.text_encoder, c.revision, usual_image(config))


def usual_image(config: DictConfig) -> tuple[int, int] | None:
    """Height and width of the image that budgets and cost are worked out for, where the model reads several sizes."""
    image = config.model.get("image")
    if image is None:
        return None
    if len(image) != 2 or not all(isinstance(side, int) and side > 0 for side in image):
        raise UserError(f"model.image={list(image)} must be a height and a width in pixels, as in [672,672]")
    return image[0], image[1]


def build_data(config: DictConfig, processor, shape: Shape, batch_size: int) -> QuestionData:
    """The data module of `config.data`."""
    c = config.data
    if is_encoder(config):
        from ivtp.build_images import build_images

        return build_images(config, processor, shape, batch_size)
    if c.name == "scenes":
        from ivtp.data.scenes import Scenes

        try:
            data = Scenes(c.split, c.scenes, c.seed)
        except ValueError as error:
            raise UserError(f"data: {error}") from error
    elif c.name == "scenes2":
        from ivtp.data.scenes2 import Scenes2

        try:
            data = Scenes2(c.split, c.scenes, c.seed, c.size, square_grid(shape))
        except ValueError as error:
            raise UserError(f"data: {error}") from error
    elif c.name == "folder":
        from ivtp.data.questions import Questions

        data = Questions(c.path, shape.patches)
    elif c.name == "lmms":
        from ivtp.data.lmms import LmmsTask

        asked = OmegaConf.to_container(c)
        name, _ = asked.pop("task"), asked.pop("name")
        data = LmmsTask(name, shape.patches, chat=config.model.prompt == CHAT, **asked)
    else:
        raise UserError(
            f"data={c.name} asks nothing, but this model answers questions: data=scenes, scenes2, folder, lmms; labelled "
            "images are for encoders (model=tiny_clip, deit_small, …)"
        )
    collate, sort = Collate(processor, config.model.prompt), config.trainer.sort
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


def model_identity(config: DictConfig, model) -> dict:
    """What the results depend on of the model: its source, and a hash of its files or the revision of the hub."""
    source = str(config.model.source)
    folder = Path((EMBEDDED | EMBEDDED_ENCODERS).get(source, source))
    files = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")] if folder.is_dir() else []
    commit = getattr(getattr(model, "config", model), "_commit_hash", None)
    dtype = str(getattr(model, "dtype", None) or next(model.parameters()).dtype).removeprefix("torch.")
    more = {name: config.model[name] for name in ("library", "pretrained", "neighbours") if name in config.model}
    return {"source": source, "hash": fingerprint(files) if files else commit, "dtype": dtype} | more
