"""Composition of the Hydra configs, and checks that refuse in one line a request that no run could meet."""

import inspect
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ivtp.core.plan import POSITIONS
from ivtp.data.answers import CREDITS, MATCHES
from ivtp.pruners import PRUNERS, list_pruners, shipped_pruners, summary
from ivtp.pruners.budget import KINDS, PER, chosen
from ivtp.registry import UnknownName, UserError, unknown

# In the wheel the configs are inside the package; in a checkout they are the top-level folder.
_INSIDE = Path(__file__).parents[1] / "configs"
FOLDER = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2] / "configs"
GROUPS = ("model", "data", "pruner", "trainer", "logger", "debug", "experiment")
VARIANT_KEYS = ("label", "series", "section", "sweep", "pruner", "budget", "position_ids", "seeds", "paper", "stand_in")

WHOLE = {
    "seed": 0,
    "trainer.batch_size": 1,
    "trainer.threads": 1,
    "trainer.share_mib": 0,
    "trainer.vision_batch": 1,
    "data.scenes": 1,
    "data.seed": 0,
    "data.limit": 1,
    "data.max_new_tokens": 1,
    "logger.samples": 0,
    "viewer": 0,
    "model.max_crops": 1,
}
"""Keys of whole numbers, with the least value."""
NULLABLE = ("trainer.threads", "trainer.vision_batch", "data.limit", "model.max_crops")
CHOICES = {
    "trainer.device": ("auto", "cpu", "cuda"),
    "trainer.sort": (False, True),
    "trainer.pack": (False, True),
    "trainer.compile": (None, "default", "reduce-overhead"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.image_padding": (None, "pad", "crop"),
    "model.load_in_4bit": (False, True),
    "model.trust_remote_code": (False, True),
    "position_ids": POSITIONS,
    "evaluate": (True, False),
    "measure": (True, False),
    "pictures": ("images", "questions"),
    "data.match": MATCHES,
    "data.answers": CREDITS,
}
TEXTS = ("name", "output", "model.source", "model.prompt", "data.path", "data.task")
OPTIONAL_TEXTS = ("model.text_encoder", "model.attn_implementation", "model.revision")


class ConfigError(UserError):
    """Request that cannot be composed; the message names the value and the fix."""


def options(group: str) -> dict[str, str]:
    """Options of a config group with a line about each: the first comment of its file, or of a pruner its first sentence."""
    if group == "pruner":
        return {name: summary(name) for name in list_pruners()}
    about = {}
    for path in sorted((FOLDER / group).glob("*.yaml")):
        lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
        about[path.stem] = next((line for line in lines if not line.startswith("@")), "")
    return about


def pruner_defaults(name: str) -> dict:
    """Config of a pruner: the settings of its function that have defaults; `seed` is that of the run."""
    parameters = inspect.signature(PRUNERS[name]).parameters.values()
    defaults = {p.name: "${seed}" if p.name == "seed" else p.default for p in parameters if p.default is not p.empty}
    return {"name": name} | defaults


def pruners_except(*names: str) -> ListConfig:
    """Pruners of this package but these; `${pruners_except:none,random}` in a config."""
    shipped = shipped_pruners()
    for name in names:
        if name not in shipped:
            raise UnknownName(unknown("pruner", name, shipped))
    return OmegaConf.create([name for name in shipped if name not in names])


OmegaConf.register_new_resolver("pruners_except", pruners_except)


def load_config(overrides: Sequence[str]) -> DictConfig:
    """Compose a config; raises ConfigError or UnknownName for a key or value that does not exist."""
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not of the form key=value")
        if key in GROUPS and value not in options(key) and (key, value) != ("experiment", "null"):
            raise UnknownName(unknown(key, value, options(key)))
    overrides = [override for override in overrides if override != "experiment=null"]
    store = ConfigStore.instance()
    for name in list_pruners():
        store.store(group="pruner", name=name, node=pruner_defaults(name))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(FOLDER.resolve()), version_base="1.3"):
            config = compose("config", overrides=list(overrides))
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise _readable(error, overrides) from error
    _forget_sizes(config, overrides)
    check(config)
    return config


def _forget_sizes(config: DictConfig, overrides: Sequence[str]) -> None:
    """Remove the sizes of a model's YAML, which are those of its own checkpoint, for another `model.source`."""
    keys = {override.lstrip("+").partition("=")[0] for override in overrides}
    for name in ("config", "architecture"):
        if "model.source" in keys and name in config.model and not any(k.startswith(f"model.{name}") for k in keys):
            config.model[name] = None


def check(config: DictConfig) -> None:
    """Refuse values that no run could use, before anything is loaded; raises ConfigError with key, value and bound."""
    missing = OmegaConf.missing_keys(config)
    if missing:
        key = min(missing)
        raise ConfigError(f"{key} has no value; give it as {key}=VALUE")
    for key, low in WHOLE.items():
        value = OmegaConf.select(config, key, default=low)
        if value is None and key in NULLABLE:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            null = ", or null" if key in NULLABLE else ""
            raise ConfigError(f"{key}={value} must be a whole number of at least {low}{null}")
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(config, key, default=allowed[0])
        if value not in allowed:
            words = {None: "null", True: "true", False: "false"}
            named = ", ".join(str(words.get(choice, choice)) for choice in allowed)
            raise ConfigError(f"{key}={value} is not one of {named}")
    if config.measure and config.trainer.compile:
        raise ConfigError(
            f"trainer.compile={config.trainer.compile}: one graph has no parts, whose times measure=true asks for; leave one out"
        )
    if config.trainer.pack and config.trainer.compile:
        raise ConfigError(
            f"trainer.compile={config.trainer.compile}: torch.compile cannot read the weights that trainer.pack=true packs; "
            "leave one out"
        )
    for key in (*TEXTS, *OPTIONAL_TEXTS):
        # A benchmark task has a data set of its own.
        optional = key in OPTIONAL_TEXTS or (key == "data.path" and config.data.name == "lmms")
        value = OmegaConf.select(config, key, default=None if optional else "-")
        if (value is None and optional) or (isinstance(value, str) and value.strip()):
            continue
        if not optional:
            raise ConfigError(f"{key}={value!r} must be a text that is not empty")
        quoted = f"quote one that reads as a number: \"{key}='12'\""
        raise ConfigError(f"{key}={value!r} must be null or a text that is not empty; {quoted}")
    if Path(config.name).name != config.name:
        raise ConfigError(f"name={config.name!r} must be the name of one folder; choose its place with output=FOLDER")
    if not isinstance(config.budget, DictConfig):
        raise ConfigError(f"budget={config.budget} must name its kind: budget.keep=16, budget.ratio=0.1, …")


def _readable(error: Exception, overrides: Sequence[str]) -> Exception:
    """Error of Hydra in one line; for an unknown key, with the closest ones."""
    known = list(_flat(_plain(overrides)))
    for override in overrides:
        key = override.partition("=")[0]
        if key not in GROUPS and not key.startswith(("+", "~")) and key not in known:
            return UnknownName(unknown("key", key, known))
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override!r} cannot be read as key=value; put a value with signs in it in quotes")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ConfigError(lines[0] if lines else type(error).__name__)


def _plain(overrides: Sequence[str]) -> Any:
    """Config with the group choices alone, to list the keys that exist."""
    choices = [o for o in overrides if o.partition("=")[0] in GROUPS]
    with initialize_config_dir(str(FOLDER.resolve()), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=choices))


def _flat(config: dict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def variants(config: DictConfig) -> Iterator[dict]:
    """Rows of an experiment, as dicts: the request of each `Result`.

    A sweep may run over settings, `pruner`, `position_ids` and every kind of budget. A row's pruner starts from the composed
    one if it is the same method (so `pruner.tau=0.3` on the command line reaches all its rows), else from its own defaults.
    """
    base: Any = OmegaConf.to_container(config)
    _check_variants(base["variants"])
    rows: list[dict[str, Any]] = base["variants"] or [{"label": "unpruned", "pruner": "none"}]
    if not base["variants"] and base["pruner"]["name"] != "none":
        rows.append({"label": base["pruner"]["name"]})
    labels = set()
    for row in rows:
        sweep = row.get("sweep") or {}
        for values in product(*sweep.values()):
            swept = dict(zip(sweep, values, strict=True))
            settings = {k: v for k, v in row.items() if k not in VARIANT_KEYS} | swept
            name = settings.pop("pruner", None) or row.get("pruner") or base["pruner"]["name"]
            pruner = base["pruner"] if name == base["pruner"]["name"] else pruner_defaults(name)
            pruner = {k: base["seed"] if v == "${seed}" else v for k, v in pruner.items()}
            budget = {k: settings.pop(k) for k in KINDS if k in settings and k not in pruner}
            given = budget or row.get("budget", base["budget"])
            per = given.get(PER, base["budget"][PER])
            budget = dict([chosen(given)]) | ({} if per == "image" else {PER: per})
            position_ids = settings.pop("position_ids", None) or row.get("position_ids", base["position_ids"])
            for key in settings:
                if key not in pruner:
                    raise UnknownName(unknown(f"setting of pruner {name!r}:", key, pruner))
            try:
                label, paper = row["label"].format(**swept), (row.get("paper") or "").format(**swept)
                series = (row.get("series") or "").format(**swept)
            except (KeyError, IndexError, ValueError) as error:
                raise ConfigError(f"label {row['label']!r}: {error} is not a key of its sweep") from error
            if label in labels:
                raise ConfigError(f"two rows are labelled {label!r}; name the swept keys in the label")
            labels.add(label)
            variant = {
                "label": label,
                "series": series or row["label"].format(**dict.fromkeys(swept, "…")),
                "section": row.get("section", ""),
                "pruner": pruner | settings,
                "budget": budget,
                "position_ids": position_ids,
                "paper": paper or None,
                "stand_in": row.get("stand_in"),
                "seeds_of": None,
            }
            yield from _seeded(variant, row.get("seeds"))


def _seeded(variant: dict, seeds: object) -> Iterator[dict]:
    """Variant, or one for each of its seeds, which the report merges again."""
    if seeds is None:
        yield variant
        return
    label, pruner = variant["label"], variant["pruner"]
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ConfigError(f"row {label!r}: seeds={seeds} must be a whole number of at least 1")
    if "seed" not in pruner:
        raise ConfigError(f"row {label!r}: seeds={seeds}, but pruner {pruner['name']!r} has no seed; leave seeds out")
    for seed in range(pruner["seed"], pruner["seed"] + seeds):
        yield variant | {"label": f"{label} · seed {seed}", "seeds_of": label, "pruner": pruner | {"seed": seed}}


def _check_variants(rows: object) -> None:
    """Refuse a row that is not a mapping with a label, and a sweep that is not a mapping of lists."""
    if not isinstance(rows, (list, type(None))):
        raise ConfigError(f"variants={rows!r} must be a list of rows")
    for number, row in enumerate(rows or [], start=1):
        if not isinstance(row, dict) or not isinstance(row.get("label"), str):
            raise ConfigError(f"row {number} of variants, {row!r}, must have a text `label` and settings")
        sweep = row.get("sweep") or {}
        if not isinstance(sweep, dict) or not all(isinstance(values, list) for values in sweep.values()):
            raise ConfigError(f"row {row['label']!r}: sweep={sweep!r} must name settings, each with a list of values")
        if not isinstance(row.get("budget", {}), dict):
            raise ConfigError(f"row {row['label']!r}: budget={row['budget']!r} must name its kind, as in {{keep: 16}}")
