"""Compose the Hydra configs, and say in one line what is wrong with a request."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ivtp.pruners import PRUNERS, list_pruners
from ivtp.pruners.budget import KINDS, PER, chosen
from ivtp.registry import UnknownName, UserError, unknown

# In the wheel the configs are inside the package; in a checkout they are the top-level folder.
_INSIDE = Path(__file__).parent / "configs"
FOLDER = _INSIDE if _INSIDE.is_dir() else Path(__file__).parent.parent / "configs"
GROUPS = ("model", "data", "pruner", "trainer", "logger", "debug", "experiment")
VARIANT_KEYS = ("label", "series", "section", "sweep", "pruner", "budget", "position_ids", "seeds", "paper", "stand_in")

# Bounds of single keys: the least whole number, what there is to choose from, what must be a text.
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
    "position_ids": ("keep", "renumber"),
    "evaluate": (True, False),
    "measure": (True, False),
    "pictures": ("images", "questions"),
    "data.match": ("exact", "vqa", "contains"),
    "data.answers": ("any", "vqa"),
}
TEXTS = ("name", "output", "model.source", "model.prompt", "data.path", "data.task")
OPTIONAL_TEXTS = ("model.text_encoder", "model.attn_implementation", "model.revision")


class ConfigError(UserError):
    """A request that cannot be composed; the message names the value and the fix."""


def options(group: str) -> dict[str, str]:
    """Name → first comment line of every option of a config group, registered third-party pruners included."""
    found = {}
    for path in sorted((FOLDER / group).glob("*.yaml")):
        lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
        found[path.stem] = next((line for line in lines if not line.startswith("@")), "")
    if group == "pruner":
        for name in list_pruners():
            found.setdefault(name, (inspect.getdoc(PRUNERS[name]) or "").split("\n")[0])
    return found


def pruner_defaults(name: str) -> dict:
    """The settings of a pruner: its YAML, or for one without (third-party) the defaults of its function."""
    if name not in PRUNERS:
        raise UnknownName(unknown("pruner", name, list_pruners()))
    path = FOLDER / "pruner" / f"{name}.yaml"
    if path.is_file():
        return OmegaConf.to_container(OmegaConf.load(path))
    parameters = inspect.signature(PRUNERS[name]).parameters.values()
    return {"name": name, **{p.name: p.default for p in parameters if p.default is not p.empty}}


def load_config(overrides: Sequence[str]) -> DictConfig:
    """The composed config; raises ConfigError or UnknownName for what does not exist."""
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not of the form key=value")
        if key in GROUPS and value not in options(key) and (key, value) != ("experiment", "null"):
            raise UnknownName(unknown(key, value, options(key)))
    overrides = [override for override in overrides if override != "experiment=null"]
    store = ConfigStore.instance()
    for name in list_pruners():
        if not (FOLDER / "pruner" / f"{name}.yaml").is_file():
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
    """Sizes in a model's YAML are those of its own checkpoint: another `model.source` is read for its own."""
    keys = {override.lstrip("+").partition("=")[0] for override in overrides}
    for name in ("config", "architecture"):
        if "model.source" in keys and name in config.model and not any(k.startswith(f"model.{name}") for k in keys):
            config.model[name] = None


def check(config: DictConfig) -> None:
    """Refuse values that no run could use, before anything is loaded; ConfigError names the key, value and bound."""
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
            named = ", ".join(words.get(choice, choice) for choice in allowed)
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
    for key in TEXTS:
        value = OmegaConf.select(config, key, default="-")
        if value is None and key == "data.path" and config.data.name == "lmms":
            continue  # the task's own data set
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{key}={value!r} must be a text that is not empty")
    for key in OPTIONAL_TEXTS:
        value = OmegaConf.select(config, key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise ConfigError(
                f"{key}={value!r} must be null or a text that is not empty; quote one that reads as a number: "
                f"\"{key}='12'\""
            )
    if Path(config.name).name != config.name:
        raise ConfigError(f"name={config.name!r} must be the name of one folder; choose its place with output=FOLDER")
    if not isinstance(config.budget, DictConfig):
        raise ConfigError(f"budget={config.budget} must name its kind: budget.keep=16, budget.ratio=0.1, …")


def _readable(error: Exception, overrides: Sequence[str]) -> Exception:
    """Hydra's error as one line; for a key that does not exist, what was meant."""
    known = _flat(_plain(overrides))
    for override in overrides:
        key = override.partition("=")[0]
        if key not in GROUPS and not key.startswith(("+", "~")) and key not in known:
            return UnknownName(unknown("key", key, known))
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override!r} cannot be read as key=value; put a value with signs in it in quotes")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ConfigError(lines[0] if lines else type(error).__name__)


def _plain(overrides: Sequence[str]) -> DictConfig:
    """The config with the group choices alone, to list the keys there are."""
    choices = [o for o in overrides if o.partition("=")[0] in GROUPS]
    with initialize_config_dir(str(FOLDER.resolve()), version_base="1.3"):
        return compose("config", overrides=choices)


def _flat(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        node = config._get_node(key)
        keys.append(f"{prefix}{key}")
        if isinstance(node, DictConfig) and not node._is_none():
            keys += _flat(node, f"{prefix}{key}.")
    return keys


def variants(config: DictConfig) -> Iterator[dict]:
    """The rows of an experiment: dicts with label, series (its line in the plot; by default the label without what
    is swept), section, pruner (name and settings), budget, position_ids; paper (the row of the paper that it repeats),
    stand_in (what it only stands in for in cost), seeds_of (of which row it is one seed).

    A sweep may run over settings, `pruner`, `position_ids` and every kind of budget.

    A row's pruner starts from the composed one if it is the same method (so `pruner.tau=0.3` on the command line
    reaches all its rows), else from the method's own defaults.
    """
    base = OmegaConf.to_container(config)
    _check_variants(base["variants"])
    rows = base["variants"] or [{"label": "unpruned", "pruner": "none"}]
    if not base["variants"] and base["pruner"]["name"] != "none":
        rows.append({"label": base["pruner"]["name"]})
    seen = set()
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
            if label in seen:
                raise ConfigError(f"two rows are labelled {label!r}; name the swept keys in the label")
            seen.add(label)
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
    """The variant, or one for each of its seeds, which the report draws together again."""
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
    """Every row is a mapping with a label; a sweep is a mapping of lists."""
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
