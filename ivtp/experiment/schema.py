"""Keys of the configuration: type, default, text, bounds and choices of each.

The dataclasses are Hydra's structured configs: composition refuses a value of another type, and a key that does not
exist. `check_value` holds bounds and choices, which OmegaConf knows nothing of.
"""

import dataclasses
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from ivtp.data.answers import CREDITS, MATCHES
from ivtp.registry import UserError


class ConfigError(UserError):
    """Request that cannot be composed; the message names the value and the fix."""


def key(default: Any, about: str, *, least: int | None = None, choices: tuple = ()) -> Any:
    """Field of a config.

    about    one paragraph for `--help`
    least    bound of a whole number
    choices  all values, or the words beside whole numbers; "cuda:N" stands for any number
    """
    metadata = {"about": about, "least": least, "choices": choices}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def mapping(about: str) -> Any:
    """Field of a config that is null or holds keys of the user's own (of type Any: OmegaConf merges no mapping into null)."""
    return field(default=None, metadata={"about": about, "least": None, "choices": (), "kinds": (dict,)})


@dataclass
class Budget:
    """Visual tokens that stay, by one of several measures."""

    keep: Any = key(None, "tokens of an image at the end; with per=crop, of each of its crops")
    tflops: Any = key(None, "TFLOPs of a prefill")
    average_tokens: Any = key(None, "visual tokens in a language layer, mean over the layers")
    like: Any = key(None, "the FLOPs of another row of the experiment, by its label")
    ratio: Any = key(0.111, "ratio of the tokens (0.111 or 1/9: 64 of 576), where none of the others is given")
    per: str = key("image", "what keep counts, where images are cut into crops", choices=("image", "crop"))


@dataclass
class Trainer:
    """The evaluation loop: devices, batches, speed. Results depend on none of these keys but by rounding."""

    batch_size: int = key(50, "samples of a batch", least=1)
    devices: int | str = key(
        1,
        "processes on this machine, each with a device and a model of its own; auto: one per GPU",
        least=1,
        choices=("auto",),
    )
    num_nodes: int = key(1, "machines, with torchrun or srun", least=1)
    accelerator: str = key("auto", "kind of device", choices=("auto", "cpu", "gpu"))
    device: str = key("auto", "device of the model", choices=("auto", "cpu", "cuda", "cuda:N"))
    precision: str | None = key(
        None,
        "precision of Lightning; null: that of the weights (model.dtype)",
        choices=(None, "32-true", "16-mixed", "bf16-mixed"),
    )
    workers: int | None = key(
        None,
        "processes per device that decode and prepare images ahead of the model; 0: none; null: on a GPU from the cores, at "
        "most 8, on a CPU none",
        least=0,
    )
    cache_mib: int = key(
        4096,
        "MiB of disk on a machine for prepared images that other rows need too, until the run ends; 0: each row prepares "
        "its own",
        least=0,
    )
    share_mib: int = key(
        512,
        "MiB of memory for outputs of the vision tower that other rows need too; 0: each row computes its own",
        least=0,
    )
    threads: int | None = key(None, "CPU threads; null: torch's choice", least=1)
    sort: bool = key(
        False, "longest prompts first, images of one size side by side: less padding in a batch, equal results"
    )
    vision_batch: int | None = key(
        None, "images, or crops of them, that go through the vision tower at once; null: all of a batch", least=1
    )
    pack: bool = key(
        False,
        "on a CPU, in float32: weights are laid out once as its kernels read them; products of few tokens then take as "
        "long per token as those of many. Outputs differ by rounding",
    )
    compile: str | None = key(
        None,
        "torch.compile of the language model's prefill, once for every row, batch size and length of prompt; "
        "reduce-overhead: with CUDA graphs",
        choices=(None, "default", "reduce-overhead"),
    )


@dataclass
class Logger:
    """Loggers of Lightning, one run per row; several at once: `logger=[wandb,csv]`."""

    wandb: bool = key(
        False, "Weights & Biases: online with a login, else offline files in the run's folder; see WANDB_MODE"
    )
    csv: bool = key(False, "CSV files in the run's folder")
    tensorboard: bool = key(False, "TensorBoard files in the run's folder (pip install tensorboard)")
    project: str = key("${oc.env:WANDB_PROJECT,ivtp}", "project in Weights & Biases")
    entity: str | None = key("${oc.env:WANDB_ENTITY,null}", "user or team in Weights & Biases; null: your default one")
    samples: int = key(24, "rows of the per-sample table that carry a picture of the kept tokens", least=0)


@dataclass
class Costs:
    """Closed-form cost of the same rows on other models."""

    models: list[str] | None = key(["llava_1_5_7b", "llava_1_5_13b"], "options of the group model")
    text: list[int] = key([512], "numbers of text tokens around the image")


@dataclass
class Run:
    """A run: the experiment, where its results go, and how."""

    model: Any = MISSING
    data: Any = MISSING
    pruner: Any = MISSING
    name: str = key("run", "name of the experiment; results go to OUTPUT/NAME")
    output: str = key("outputs", "folder of all results")
    seed: int = key(0, "seed of pruners that draw", least=0)
    plugins: list[str] = key([], "files or modules whose pruners are options too: [my_pruner.py]")
    dry_run: bool = key(False, "print the rows with their cuts, cost and time, without loading weights")
    budget: Budget = key(Budget, "how much may stay: one of its keys")
    position_ids: str = key(
        "keep",
        "positions of kept tokens in the language model: their own, or counted anew",
        choices=("keep", "renumber"),  # as ivtp.core.plan.POSITIONS, which would import torch
    )
    compare_to: str | None = key(
        None, "label of the row that all others are tested against, besides the unpruned model"
    )
    variants: Any = key(
        [],
        "rows of the table; empty: the unpruned model and the pruner above. A row has a label and may set pruner, any of "
        "its settings, budget and position_ids; sweep: lists of values (of settings, pruner, position_ids or a kind of "
        "budget), whose product makes one row each; seeds: N, the mean over so many; paper: table1/IVTP, the row that it "
        'repeats; section: part of the table; series: "{pruner}", rows that are one line of the plot',
    )
    evaluate: bool = key(True, "false: the experiment is about cost alone, which needs no images")
    blind: bool = key(False, "the unpruned model also answers the questions without their images (blind accuracy)")
    measure: bool = key(False, "time per part, and FLOPs counted on one sample; nothing is shared between rows then")
    costs: Costs = key(Costs, "cost of the same rows on other models, from their configs alone")
    paper: list[str] = key([], "tables of the paper (ivtp/report/paper.yaml) that are shown beside ours")
    claims: list[Any] = key(
        [],
        "claims of the paper, as two rows whose difference is claimed to be positive: "
        "{claim, rows: [better, worse], paper: points}",
    )
    question: str | None = key(None, "question of the experiment; null: the first comment of its file")
    kept_tokens: str = key(
        "images",
        "columns of kept_tokens.png: different images, or several questions about one image",
        choices=("images", "questions"),
    )
    overlap: str | None = key(
        None,
        "section whose rows are compared by the tokens that they keep, where they end with the same number of them",
    )
    viewer: int = key(
        40,
        "images (the first ones of the data) whose questions the report page shows token by token, cut by cut",
        least=0,
    )
    trainer: Trainer = key(Trainer, "the evaluation loop")
    logger: Logger = key(Logger, "loggers")


DTYPES = ("auto", "float32", "bfloat16", "float16")
SIZES = "sizes, as in the config of transformers, so that cost is known without weights or network"
REVISION = "commit, branch or tag on the hub"
SOURCE = "a hub id, or a folder with config and *.safetensors"


@dataclass
class VisionLanguage:
    """A model that answers questions about images."""

    source: str = key(MISSING, f'{SOURCE}; "tiny": the embedded model')
    prompt: str = key("chat", "template with <image> and {question}; chat: the processor's chat template")
    text_encoder: str | None = key(
        None, "the CLIP text encoder paired with the tower: a folder or hub id; null: the folder clip of the checkpoint"
    )
    dtype: str = key("auto", "of the weights; auto: as they are stored", choices=DTYPES)
    attn_implementation: str | None = key(None, "attention kernel of transformers; null: its choice")
    revision: str | None = key(None, REVISION)
    device_map: Any = key(None, "accelerate's, as in auto; null: all of it on trainer.device")
    load_in_4bit: bool = key(False, "weights in 4 bits, by bitsandbytes")
    trust_remote_code: bool = key(False, "true runs code that comes with a checkpoint")
    image_padding: str | None = key(
        None,
        "how images are made square: padded with the mean colour, as LLaVA-1.5 was trained and is evaluated, or cropped at "
        "the centre; null: as the checkpoint has it",
        choices=(None, "pad", "crop"),
    )
    max_crops: int | None = key(
        None, "the most crops of an image besides the whole; null: as the checkpoint has it", least=1
    )
    max_pixels: int | None = key(
        None,
        "the most pixels of an image, for models that read images at their own size (Qwen-VL); null: as the checkpoint has it",
        least=1,
    )
    image: list[int] | None = key(None, "height and width of the image that budgets and cost refer to")
    config: Any = mapping(SIZES)


@dataclass
class Encoder:
    """Keys of every image encoder, which sorts images into classes."""

    source: str = key(MISSING, SOURCE)
    library: str = key(MISSING, "library that loads it", choices=("timm", "open_clip", "transformers"))
    revision: str | None = key(None, REVISION)
    dtype: str = key("auto", "of the weights; auto: as they are stored", choices=DTYPES)
    neighbours: int = key(
        0, "images of the gallery (data.gallery) that vote, by their likeness; 0: the model's own classifier", least=0
    )


@dataclass
class TimmEncoder(Encoder):
    """An encoder of timm."""

    library: str = "timm"
    pretrained: bool = key(True, "false: random weights")


@dataclass
class OpenClipEncoder(Encoder):
    """A dual encoder of open_clip, zero-shot by class names."""

    library: str = "open_clip"
    pretrained: bool = key(True, "false: random weights")
    templates: list[str] = key(["a photo of a {}."], "texts that class names go into; several are averaged")
    architecture: str | None = key(None, "of open_clip, so that cost is known without weights or network")


@dataclass
class TransformersEncoder(Encoder):
    """An encoder of transformers."""

    library: str = "transformers"
    attn_implementation: str | None = key(None, "attention kernel of transformers; null: its choice")
    templates: list[str] | None = key(None, "texts that class names go into; several are averaged")
    config: Any = mapping(SIZES)


LIMIT = "samples; null: all"
NEW_TOKENS = "tokens of an answer, at most"


@dataclass
class Scenes2:
    """Procedural questions about hundreds of named drawings and renders over photographs, by seed; eight families."""

    name: str = "scenes2"
    split: str = key("test", "train, validation, test; style: drawn in Twemoji; wild: in clip art")
    scenes: int = key(
        140, "images, each with one question of every family; 140: standard errors of 1.2 to 1.6 points", least=1
    )
    seed: int = key(0, "seed of the images", least=0)
    size: int = key(144, "side of the images in pixels, 144 or 192", least=1)
    limit: int | None = key(None, LIMIT, least=1)
    max_new_tokens: int = key(8, NEW_TOKENS, least=1)


@dataclass
class Folder:
    """Your own questions: a folder with images and questions.jsonl, one {"id", "image", "question", "answer"} a line."""

    name: str = "folder"
    path: str = key(
        MISSING, "folder with the images and questions.jsonl, .json, .csv or .parquet; see docs/how-to/own_data.md"
    )
    match: str = key(
        "exact",
        "when an answer matches an accepted one: the same text without case, surrounding space and a final full stop; vqa: the "
        "same after VQAv2's normalisation (needs lmms-eval); contains: the accepted answer stands in it as whole words",
        choices=MATCHES,
    )
    answers: str = key(
        "any",
        "worth of several accepted answers: 1 if one matches; vqa: min(matches / 3, 1) over the other annotators' answers, "
        "averaged over annotators",
        choices=CREDITS,
    )
    limit: int | None = key(None, LIMIT, least=1)
    max_new_tokens: int = key(16, NEW_TOKENS, least=1)


@dataclass
class Lmms:
    """Any task of lmms-eval, its own prompts, post-processing and metrics: data.task=NAME (pip install "ivtp[lmms]")."""

    name: str = "lmms"
    task: str = key(MISSING, "name of the task")
    path: str | None = key(
        None, "a folder with a copy of its data set, or another hub id; null: the data set on the hub"
    )
    preset: str = key("default", "which of the task's prompts: default, or a model that it has one for")
    prompt: Any = mapping("single settings of that prompt, over its own")
    generation: Any = mapping("settings of generate over the task's own, as --gen_kwargs of lmms-eval")
    metric: Any = key(None, "the metric that the run is about, or a list: their sum; null: the task's first")
    alone: bool = key(
        False,
        "true: an answer is right where the metric of it alone says so; for tasks that score only all of them",
    )
    family: str | None = key(None, "column of the documents that accuracy is broken down by")
    macro: bool = key(False, "the run is about the macro average of the metric, its mean over the families")
    judge: Any = mapping(
        "environment variables of the judge that some tasks ask, such as {MODEL_VERSION: gpt-4o-2024-11-20, "
        "OPENAI_API_URL: …}; its key stays in the environment (OPENAI_API_KEY). null: such tasks are refused",
    )
    limit: int | None = key(None, LIMIT, least=1)


@dataclass
class Emoji:
    """Labelled images: emoji in several drawing styles, 443 classes, offline; for encoders that sort by nearest neighbours."""

    name: str = "emoji"
    styles: list[str] = key(
        ["noto-v1", "fluent-flat", "fluent-3d", "emojione", "twemoji"], "styles of the images that are sorted"
    )
    gallery: list[str] = key(["noto"], "styles of the images that vote")
    size: int = key(8, "longer side of a drawing in twelfths of the picture's, at most 12", least=1)
    background: str = key("white", "of the drawings", choices=("white", "photo"))
    limit: int | None = key(None, LIMIT, least=1)


@dataclass
class ImageFolder:
    """Labelled images: a folder with one folder of images per class (ImageNet's own layout); for encoders."""

    name: str = "imagefolder"
    path: str = key(MISSING, "the folder")
    gallery: str | None = key(None, "a folder like it, for models that vote by nearest neighbours")
    limit: int | None = key(None, LIMIT, least=1)


@dataclass
class HubImages:
    """Labelled images: a data set of the hub, by id, or a folder of its parquet files; for encoders."""

    name: str = "hub_images"
    path: str = key(MISSING, "hub id, or folder")
    split: str = key("test", "split of the images that are sorted")
    gallery: str | None = key(None, "a split of it, for models that vote by nearest neighbours")
    image: str = key("image", "column of the images")
    label: str = key("label", "column of the labels")
    revision: str | None = key(None, REVISION)
    limit: int | None = key(None, LIMIT, least=1)


OPTIONS: dict[str, type] = {
    **{f"data/{kind.name}": kind for kind in (Scenes2, Folder, Lmms, Emoji, ImageFolder, HubImages)},
    "model/base/vlm": VisionLanguage,
    "model/base/timm": TimmEncoder,
    "model/base/open_clip": OpenClipEncoder,
    "model/base/transformers": TransformersEncoder,
}
"""Options of config groups that are dataclasses; the YAML files of a group build on them."""


def register() -> None:
    """Make the dataclasses known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Run)
    for path, kind in OPTIONS.items():
        group, _, name = path.rpartition("/")
        store.store(group=group, name=name, node=kind)


# Values -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """Key of the configuration; `kinds` are the types of its values, without null.

    A key without a text is a group, or the fixed name of an option, and not for users to set.
    """

    name: str
    kinds: tuple[type, ...]
    nullable: bool
    default: Any
    about: str
    least: int | None = None
    choices: tuple = ()


def keys_of(kind: type, prefix: str = "") -> Iterator[Key]:
    """Keys of a dataclass, those of nested ones included."""
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        hint, name, more = hints[f.name], prefix + f.name, {"about": "", "least": None, "choices": ()} | f.metadata
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        kinds = tuple(object if part is Any else get_origin(part) or part for part in parts if part is not type(None))
        default = f.default if f.default is not NO_DEFAULT else f.default_factory()  # type: ignore[misc]
        nullable = type(None) in parts or object in kinds
        kinds = more.pop("kinds", kinds)
        yield Key(name, kinds, nullable, default, **more)
        if is_dataclass(hint):
            yield from keys_of(hint, f"{name}.")  # type: ignore[arg-type]


KEYS: dict[str, list[Key]] = {}
"""Keys of all groups by name; several of one name belong to different options of a group."""
for _key in [
    *keys_of(Run),
    *(k for path, kind in OPTIONS.items() for k in keys_of(kind, f"{path.partition('/')[0]}.")),
]:
    KEYS.setdefault(_key.name, []).append(_key)


def free(name: str) -> bool:
    """True for a key below one that holds keys of the user's own, as in data.judge.MODEL_VERSION."""
    return any({dict, object} & set(k.kinds) for key in with_parents(name)[1:] for k in KEYS.get(key, []) if k.about)


def with_parents(name: str) -> list[str]:
    """A key and those above it: a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def check_value(name: str, value: Any) -> None:
    """Refuse a value that no run could use; raises ConfigError with key, value and bound."""
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value)
    if isinstance(value, str) and ("${" in value or value == MISSING):
        return
    errors = [_error(k, value) for k in KEYS.get(name, [])]
    if errors and all(errors):
        raise ConfigError(str(errors[0]))


def _error(k: Key, value: Any) -> str | None:
    """Reason why a key cannot have a value; None if it can."""
    name, null = k.name, ", or null" if k.nullable else ""
    if (value is None and k.nullable) or not k.about or any(_matches(value, choice) for choice in k.choices):
        return None
    if is_dataclass(k.kinds[0]):
        if not isinstance(value, dict):
            some = ("keep=16", "ratio=0.1") if name == "budget" else ("KEY=VALUE",)
            return f"{name}={value} must name its kind: {', '.join(f'{name}.{one}' for one in some)}, …"
        for part, inner in value.items():
            check_value(f"{name}.{part}", inner)
    elif int in k.kinds:
        if isinstance(value, bool) or not isinstance(value, int) or value < (k.least or 0):
            words = "".join(f", or {choice}" for choice in k.choices) + null
            return f"{name}={value} must be a whole number of at least {k.least or 0}{words}"
    elif k.choices or bool in k.kinds:
        choices = k.choices or (False, True)
        if not any(_matches(value, choice) for choice in choices):
            return f"{name}={value} is not one of {', '.join(map(as_written, choices))}"
    elif str in k.kinds and not (isinstance(value, str) and value.strip()):
        if not k.nullable:
            return f"{name}={value!r} must be a text that is not empty"
        quoted = f"quote one that reads as a number: \"{name}='12'\""
        return f"{name}={value!r} must be null or a text that is not empty; {quoted}"
    elif list in k.kinds and not isinstance(value, list):
        return f"{name}={value} must be a list, as in {name}=[{value}]"
    elif dict in k.kinds and not isinstance(value, dict):
        return f"{name}={value} must name settings, as in {name}={{KEY: VALUE}}{null}"
    return None


def _matches(value: Any, choice: Any) -> bool:
    if isinstance(choice, str) and choice.endswith(":N"):
        return isinstance(value, str) and re.fullmatch(re.escape(choice[:-1]) + r"\d+", value) is not None
    return type(value) is type(choice) and value == choice


def as_written(value: Any) -> str:
    """Value as it is given on the command line."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(as_written, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return "???" if value == MISSING else str(value)
