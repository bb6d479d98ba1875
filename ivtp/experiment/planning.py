"""Model, data and planned rows from a config: the only module that knows both configs and objects."""

import inspect
import sys
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ivtp.api import load_model, source_shape
from ivtp.backbones import shape_of
from ivtp.backbones.loading.hub import CODE, SMALL, Checkpoint
from ivtp.backbones.loading.image_inputs import limit_crops, padding_of
from ivtp.backbones.text.pairing import text_checkpoint
from ivtp.core.conventions import resampler
from ivtp.core.flops import Cost, Shape, cost
from ivtp.core.plan import Plan
from ivtp.data.datamodule import CHAT, Collate, QuestionData
from ivtp.pruners import PRUNERS, load_pruner
from ivtp.pruners.budget import solve
from ivtp.pruners.planner import Planner
from ivtp.registry import UnknownName, UserError, unknown
from ivtp.results import Result, fingerprint

STAND_INS = {"resampler": resampler}
"""Methods with trained modules of their own: their cost is known, they are never run."""
LOADING = (
    *("text_encoder", "dtype", "revision", "attn_implementation", "device_map", "load_in_4bit", "trust_remote_code"),
    *("image_padding", "max_crops", "max_pixels"),
)
"""Keys of `config.model` that are arguments of `load_model`."""


def quiet_libraries() -> None:
    """Silence messages of libraries about what a run does on purpose; our own warnings and download bars stay."""
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
    """True if `config.model` sorts images into classes, False if it answers questions about them."""
    return "library" in config.model


def build_model(config: DictConfig, device: str = "cpu"):
    """Load model and processor of `config.model`; for an encoder (`model.library`), its module and the `Encoder`."""
    c = config.model
    if is_encoder(config):
        from ivtp.experiment.encoders import build_encoder

        encoder = build_encoder(config, device)
        return encoder.model, encoder
    settings = {name: c[name] for name in LOADING if name in c}
    return load_model(c.source, device=device, pack=config.trainer.pack, **settings)


def build_shape(config: DictConfig) -> Shape:
    """Sizes of `config.model` without its weights: from its own `config`, else from the checkpoint's."""
    from transformers import AutoConfig

    quiet_libraries()
    if is_encoder(config):
        from ivtp.experiment.encoders import build_encoder_shape

        return build_encoder_shape(config)
    c = config.model
    crops = c.get("max_crops")
    if not c.get("config"):
        return source_shape(c.source, c.text_encoder, c.revision, usual_image(config), crops)
    sizes: Any = OmegaConf.to_container(c.config)
    model = AutoConfig.for_model(**sizes)
    if crops is not None:
        limit_crops(model, crops)
    return shape_of(model, usual_image(config))


def usual_image(config: DictConfig) -> tuple[int, int] | None:
    """Height and width of the image that budgets and cost refer to, where the model reads several sizes."""
    image = config.model.get("image")
    if image is None:
        return None
    if len(image) != 2 or not all(isinstance(side, int) and side > 0 for side in image):
        raise UserError(f"model.image={list(image)} must be a height and a width in pixels, as in [672,672]")
    return image[0], image[1]


def context_of(model) -> int | None:
    """Context length of the language model as its config states it; None where it states none."""
    config: Any = getattr(model, "config", None)
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
    """Data module of `config.data`; longer prompts than `context` are refused."""
    if is_encoder(config):
        from ivtp.experiment.encoders import build_images

        return build_images(config, processor, shape, batch_size)
    data = build_source(config, shape)
    collate, sort = Collate(processor, config.model.prompt, context), config.trainer.sort
    return QuestionData(data, collate, batch_size, config.data.limit, sort, shape.by_image)


def build_source(config: DictConfig, shape: Shape) -> Any:
    """Samples of `config.data`, without the model."""
    c = config.data
    if is_encoder(config):
        from ivtp.experiment.encoders import labelled_images

        return labelled_images(c, shape)
    if c.name == "scenes2":
        from ivtp.data.scenes2 import Scenes2

        grid = isqrt(shape.patches)
        if not grid or grid**2 != shape.patches:
            raise UserError(
                f"data=scenes2 needs a model that cuts its images into a square of patches, not {shape.patches}"
            )
        try:
            return Scenes2(c.split, c.scenes, c.seed, c.size, grid)
        except ValueError as error:
            raise UserError(f"data: {error}") from error
    if c.name == "folder":
        from ivtp.data.questions import Questions

        return Questions(c.path, shape.patches, c.match, c.answers)
    if c.name == "lmms":
        from ivtp.lmms.dataset import LmmsTask, TaskSettings

        settings: Any = OmegaConf.to_container(c)
        name, _ = settings.pop("task"), settings.pop("name")
        return LmmsTask(name, shape.patches, TaskSettings(**settings), chat=config.model.prompt == CHAT)
    raise UserError(
        f"data={c.name} asks nothing, but this model answers questions: data=scenes2, folder, lmms; labelled "
        "images are for encoders (model=tiny_clip, deit_small, …)"
    )


def prompt_of(config: DictConfig) -> str:
    """Prompt template of a question; of an encoder that reads class names, templates of those."""
    return config.model.get("prompt") or " | ".join(config.model.get("templates") or ())


@dataclass(frozen=True, kw_only=True)
class Planned(Result):
    """Result of a row as far as it is known before the first image, with its plan and cost, which are not stored."""

    plan: Plan
    planner: Planner | Plan
    cost: Cost


def plan_rows(rows: list[dict], shape: Shape, text: int, instruction: int | None) -> list[Planned]:
    """Plan every row; raises UserError, naming the row, for a budget or setting that cannot be met.

    text, instruction  tokens of a prompt around the image, and of the instruction in the CLIP text encoder
    """
    planned: dict[str, Planned] = {}
    for row in rows:
        name = row.get("stand_in")
        if name not in (None, *STAND_INS):
            raise UnknownName(unknown(f"stand_in of row {row['label']!r}:", name, STAND_INS))
        costs = {label: other.cost for label, other in planned.items()}
        try:
            if name:
                planned[row["label"]] = _stand_in(row, shape, text)
            else:
                planned[row["label"]] = _plan_row(row, shape, text, instruction, costs)
        except ValueError as error:
            raise UserError(f"row {row['label']!r}: {error}") from error
    return list(planned.values())


def _plan_row(row: dict, shape: Shape, text: int, instruction: int | None, costs: dict[str, Cost]) -> Planned:
    """Solve the budget of a row and plan it; costs: of the rows above, for a budget that is the cost of one of them."""
    name = row["pruner"]["name"]
    settings = {key: value for key, value in row["pruner"].items() if key != "name"}
    settings |= {"position_ids": row["position_ids"], "per": row["budget"].get("per", "image")}
    build, kept, share = partial(load_pruner, name, shape, **settings), {}, None
    # Budgets and tables count as the papers do, so that their numbers can be set beside each other.
    spend = partial(cost, shape, text=text, instruction=instruction, convention="paper")
    if "keep" in inspect.signature(PRUNERS[name]).parameters:
        keep = solve(row["budget"], shape, lambda keep: spend(build(keep=keep)), costs)
        kept = {"keep": keep}
        if shape.by_image and "keep" not in row["budget"]:
            share = keep / shape.tokens  # a budget of tokens counts them in each image, all others fix their share
    plan = build(**kept)
    row = row | {"pruner": row["pruner"] | kept}
    return _planned(row, plan, spend(plan), Planner(name, shape, settings | kept, share))


def _stand_in(row: dict, shape: Shape, text: int) -> Planned:
    """Plan a row of which only the cost is known."""
    stand_in = partial(STAND_INS[row["stand_in"]], convention="paper")
    keep = solve(row["budget"], shape, lambda keep: stand_in(shape, keep, text)[1])
    plan, spent = stand_in(shape, keep, text)
    return _planned(row, plan, spent, plan)


def _planned(row: dict, plan: Plan, cost: Cost, planner: Planner | Plan) -> Planned:
    return Planned(
        **row,
        plan=plan,
        planner=planner,
        cost=cost,
        tokens=list(cost.tokens),
        average_tokens=cost.average_tokens,
        tflops=cost.tflops(),
        cuts={
            site: [[cut.layer, cut.keep, cut.after] for cut in stage.schedule] if stage else []
            for site, stage in (("vision", plan.vision), ("language", plan.language))
        },
    )


def model_identity(config: DictConfig, model, processor) -> dict:
    """Source, commit or hash and dtype of the model, and settings of its images."""
    checkpoint = getattr(model, "_checkpoint", None)  # None: random weights
    dtype = str(getattr(model, "dtype", None) or next(model.parameters()).dtype).removeprefix("torch.")
    more = {name: config.model[name] for name in ("library", "pretrained", "neighbours") if name in config.model}
    limits = {name: config.model.get(name) for name in ("max_crops", "max_pixels")}
    images = {"image_padding": padding_of(processor.image_processor)} | limits
    more |= {name: value for name, value in images.items() if value is not None and not is_encoder(config)}
    if config.trainer.precision is not None:
        more["precision"] = config.trainer.precision
    content = None if checkpoint is None else checkpoint_hash(checkpoint)
    return {"source": str(config.model.source), "hash": content, "dtype": dtype} | more


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    """Commit of a checkpoint on the hub, or hash of the files of its folder that loading may read."""
    if checkpoint.commit is not None:
        return checkpoint.commit
    patterns = (*SMALL, *CODE, "*.safetensors")
    return fingerprint([p for pattern in patterns for p in checkpoint.folder.rglob(pattern) if p.is_file()])


def text_identity(model, rows: list[Planned]) -> dict | None:
    """Source of the model's text encoder, and a hash of its files or its commit; None where no row reads it.

    Fetches the encoder if it is not here yet, so that errors in it come before the first sample.
    """
    checkpoint = text_checkpoint(model) if any(row.plan.reads_text for row in rows) else None
    if checkpoint is None:
        return None
    return {"source": checkpoint.source, "hash": checkpoint_hash(checkpoint)}


def pruner_source(name: str) -> str | None:
    """Hash of the source of a third-party pruner; None for one of this package, whose code is hashed as a whole.

    Covers the pruner's package, or for a single file those of its imports that lie beside it.
    """
    function = inspect.unwrap(PRUNERS[name])
    top = function.__module__.partition(".")[0]
    if top == "ivtp":
        return None
    path = Path(inspect.getsourcefile(function) or "")
    if not path.is_file():
        raise UserError(
            f"pruner {name!r} was defined in a session, and a result cannot be tied to its source; put it into a file"
        )
    folders = getattr(sys.modules[top], "__path__", None)
    if folders is not None:
        return fingerprint([file for folder in folders for file in Path(folder).rglob("*.py")])
    if "site-packages" in path.parts:
        return fingerprint([path])
    loaded = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    return fingerprint([*{path} | {file for file in loaded if file.parent == path.parent}])
