"""Compose the Hydra configs, and say in one line what is wrong with a request."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ivtp.pruners import PRUNERS, list_pruners
from ivtp.pruners.budget import chosen
from ivtp.registry import UnknownName, UserError, unknown

# In the wheel the configs are inside the package; in a checkout they are the top-level folder.
_INSIDE = Path(__file__).parent / "configs"
FOLDER = _INSIDE if _INSIDE.is_dir() else Path(__file__).parent.parent / "configs"
GROUPS = ("model", "data", "pruner", "trainer", "logger", "debug", "experiment")
VARIANT_KEYS = ("label", "section", "sweep", "pruner", "budget", "position_ids")


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
        if key in GROUPS and value not in ("null", "") and value not in options(key):
            raise UnknownName(unknown(key, value, options(key)))
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
    return config


def _readable(error: Exception, overrides: Sequence[str]) -> Exception:
    """Hydra's error as one line; for a key that does not exist, what was meant."""
    known = _flat(_plain(overrides))
    for override in overrides:
        key = override.partition("=")[0]
        if key not in GROUPS and not key.startswith(("+", "~")) and key not in known:
            return UnknownName(unknown("key", key, known))
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
    """The rows of an experiment: dicts with label, section, pruner (name and settings), budget, position_ids.

    A row's pruner starts from the composed one if it is the same method (so `pruner.tau=0.3` on the command line
    reaches all its rows), else from the method's own defaults.
    """
    base = OmegaConf.to_container(config)
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
            for key in settings:
                if key not in pruner:
                    raise UnknownName(unknown(f"setting of pruner {name!r}:", key, pruner))
            label = row["label"].format(**swept)
            if label in seen:
                raise ConfigError(f"two rows are labelled {label!r}; name the swept keys in the label")
            seen.add(label)
            yield {
                "label": label,
                "section": row.get("section", ""),
                "pruner": pruner | settings,
                "budget": dict([chosen(row.get("budget", base["budget"]))]),
                "position_ids": row.get("position_ids", base["position_ids"]),
            }
