"""Composition of the Hydra configs, and checks that refuse in one line a request that no run could meet."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from ivtp.experiment import catalogue, plugins, schema
from ivtp.experiment.schema import ConfigError, check_value
from ivtp.registry import UnknownName, unknown
from ivtp.text import first_sentence

# In the wheel the configs are inside the package; in a checkout they are the top-level folder.
_INSIDE = Path(__file__).parents[1] / "configs"
FOLDER = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2] / "configs"
GROUPS = ("model", "data", "pruner", "trainer", "logger", "debug", "experiment")
NEEDED = ("model", "data", "pruner")
PLUGGED = {"hydra/launcher": "joblib, submitit_local and submitit_slurm", "hydra/sweeper": "optuna"}
"""Groups of Hydra that its plugins extend."""
RENAMED = {"pictures": "kept_tokens"}
"""Keys that had other names before."""

schema.register()


def options(group: str, folders: Sequence[Path] = ()) -> dict[str, str]:
    """Options of a config group with a line about each: the first comment of its file, or the first sentence of its code.

    folders  more places than the configs of this package, searched first
    """
    if group == "pruner":
        return {name: option.about for name, option in catalogue.pruners().items()}
    kinds = {path.rpartition("/")[2]: kind for path, kind in schema.OPTIONS.items() if path.rpartition("/")[0] == group}
    about = {name: first_sentence(kind.__doc__) for name, kind in kinds.items()}
    for path in [path for folder in (FOLDER, *reversed(folders)) for path in (folder / group).glob("*.yaml")]:
        about[path.stem] = first_comment(path)
    return dict(sorted(about.items()))


def first_comment(path: Path) -> str:
    """First line of comment of a config file that is not a directive of Hydra."""
    lines = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("@")), "")


def pruner_defaults(name: str) -> dict:
    """Config of a pruner: the settings of its function that have defaults; `seed` is that of the run."""
    known = catalogue.pruners()
    if name not in known:
        raise UnknownName(unknown("pruner", name, known))
    return known[name].config()


def pruners_except(*names: str) -> ListConfig:
    """Pruners of this package but these; `${pruners_except:none,random}` in a config."""
    shipped = catalogue.shipped()
    for name in names:
        if name not in shipped:
            raise UnknownName(unknown("pruner", name, shipped))
    return OmegaConf.create([name for name in shipped if name not in names])


OmegaConf.register_new_resolver("pruners_except", pruners_except, replace=True)


# Overrides, before composition --------------------------------------------------------------------------------------


def prepare(overrides: Sequence[str], multirun: bool = False) -> list[str]:
    """Check overrides, and make the pruners of plugins known to Hydra; return the overrides to compose.

    Raises ConfigError or UnknownName for one that no composition could use, in the words of a user.
    """
    overrides = [override for override in overrides if override != "experiment=null"]
    parsed = [_parsed(override) for override in overrides]
    for override in parsed:
        value: Any = override.value()
        if override.key_or_group == "plugins" and isinstance(value, list):
            plugins.load(value)
    for override in parsed:
        _check_override(override, multirun)
    add_pruners()
    return [_merged(override) for override in parsed]


def add_pruners() -> None:
    """Make all pruners that are known by now options of the group `pruner`."""
    store = ConfigStore.instance()
    for name, option in catalogue.pruners().items():
        store.store(group="pruner", name=name, node=option.config())


def _parsed(override: str) -> Override:
    if "=" not in override and not override.startswith("~"):
        raise ConfigError(f"{override!r} is not of the form key=value")
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise _unreadable(override) from error


def _unreadable(override: object) -> ConfigError:
    return ConfigError(f"{override!r} cannot be read as key=value; put a value with signs in it in quotes")


def _merged(override: Override) -> str:
    """Override as Hydra can apply it: one of a free key, or below it, adds to the mapping, which may be null as yet."""
    name, written = override.key_or_group, str(override.input_line)
    parents = schema.with_parents(name)
    base = next((key for key in parents if any(dict in k.kinds for k in schema.KEYS.get(key, []))), None)
    if base is None or (name == base and not isinstance(override.value(), dict)):
        return written
    value = written.partition("=")[2]
    for part in reversed(name.removeprefix(base).split(".")[1:]):
        value = f"{{{part}: {value}}}"
    return f"++{base}={value}" if name == base or written.startswith("+") else written


def values_of(override: Override) -> list:
    """Value of an override; of a sweep, those that it lists."""
    value = override.value()
    if not isinstance(value, Sweep):
        return [value]
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else []


def _check_override(override: Override, multirun: bool) -> None:
    name, written, value = override.key_or_group, str(override.input_line), override.value()
    if name == "hydra.searchpath" and isinstance(value, list):
        for place in value:
            folder = Path(str(place).removeprefix("file://"))
            if not str(place).startswith("pkg://") and not folder.is_dir():
                raise ConfigError(
                    f"hydra.searchpath: there is no folder {str(folder)!r}; give one, as in [file:///my/configs]"
                )
    if name.startswith(("hydra.", "hydra/")):
        return
    if override.is_sweep_override() and not multirun:
        raise ConfigError(f"{written!r} has several values: add -m to run each, or write a list as {name}=[a,b]")
    if override.is_delete():
        if name in NEEDED:
            raise ConfigError(f"{written!r}: a run needs a {name}; choose one with {name}=NAME")
        if name in schema.KEYS and name not in GROUPS:
            raise ConfigError(f"{written!r}: every run needs this key; give it a value, or leave it as it is")
        return
    if name.split("/")[0] in GROUPS:
        if name in NEEDED and None in values_of(override):
            raise UnknownName(unknown(name, "null", options(name)))
        return
    if (override.is_add() or override.is_force_add()) and not known_key(name):
        raise unknown_key(name)
    for value in values_of(override):
        check_value(name, value)


def known_key(name: str) -> bool:
    """True for a key of the schema, a key below a free one, and a setting of some pruner."""
    setting = name.removeprefix("pruner.")
    return (
        name in schema.KEYS
        or schema.free(name)
        or (setting != name and any(setting in option.settings for option in catalogue.pruners().values()))
    )


def unknown_key(name: str, known: Iterable[str] = schema.KEYS) -> UnknownName:
    """Error for a key that does not exist: with its present name, the closest one, or those beside it."""
    if name in RENAMED:
        return UnknownName(f"key {name!r} is called {RENAMED[name]!r} now")
    known = [*known, *GROUPS]
    if difflib.get_close_matches(name, known, cutoff=0.5):
        return UnknownName(unknown("key", name, known))
    above = name.rpartition(".")[0]
    beside = [k for k in known if k.rpartition(".")[0] == above] or [k for k in known if "." not in k]
    return UnknownName(unknown("key", name, set(beside)))


# Composition --------------------------------------------------------------------------------------------------------


def load_config(overrides: Sequence[str], folders: Sequence[str | Path] = ()) -> DictConfig:
    """Compose a config; raises ConfigError or UnknownName for a key or value that does not exist.

    folders  configs of one's own; inside of a Hydra job its search path counts too
    """
    overrides, places = prepare(overrides), [*(Path(folder).resolve() for folder in folders), *own_folders()]
    try:
        with _composing():
            config = compose("config", overrides=[*overrides, *search_path(places)])
        return finish(config, overrides, places)
    except (HydraException, OmegaConfBaseException) as error:
        raise readable(error, overrides, places) from error


@contextmanager
def _composing() -> Iterator[None]:
    """Hydra's compose API on our configs; a Hydra job that runs already goes on afterwards."""
    running = GlobalHydra.instance()
    before = running.hydra
    running.clear()
    try:
        with initialize_config_dir(str(FOLDER.resolve()), version_base="1.3"):
            yield
    finally:
        running.hydra = before


def search_path(folders: Iterable[Path]) -> list[str]:
    """Override that has Hydra look for configs in these folders too."""
    places = [repr(f"file://{folder}") for folder in folders]
    return [f"hydra.searchpath=[{','.join(places)}]"] if places else []


def own_folders() -> list[Path]:
    """Folders of the search path of this Hydra job that are the user's own."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [Path(s.path) for s in sources if s.schema == "file" and s.provider != "main"]


def arguments_of_job(folder: Path) -> list[str]:
    """Arguments with which another process runs this Hydra job, into the same folder."""
    return [*HydraConfig.get().overrides.task, *search_path(own_folders()), f"hydra.run.dir={str(folder)!r}"]


def finish(config: DictConfig, overrides: Sequence[str], folders: Sequence[Path] = ()) -> DictConfig:
    """Resolve a composed config in place, load its plugins, and check it."""
    OmegaConf.resolve(config)
    plugins.load(config.plugins)
    _forget_sizes(config, overrides)
    if config.question is None:
        config.question = options("experiment", folders).get(config.name) or None
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
        name = min(missing)
        raise ConfigError(f"{name} has no value; give it as {name}=VALUE")
    for name in _flat(config):
        if name not in schema.KEYS and not schema.free(name) and not name.startswith("pruner."):
            raise unknown_key(name)
        check_value(name, OmegaConf.select(config, name))
    if config.measure and config.trainer.compile:
        raise ConfigError(
            f"trainer.compile={config.trainer.compile}: one graph has no parts, whose times measure=true asks for; leave one out"
        )
    if config.trainer.pack and config.trainer.compile:
        raise ConfigError(
            f"trainer.compile={config.trainer.compile}: torch.compile cannot read the weights that trainer.pack=true packs; "
            "leave one out"
        )
    _check_devices(config.trainer)
    _check_claims(OmegaConf.to_container(config.claims))
    if Path(config.name).name != config.name:
        raise ConfigError(f"name={config.name!r} must be the name of one folder; choose its place with output=FOLDER")


def _check_claims(claims: Any) -> None:
    """Refuse a claim that is not a text about two rows."""
    for claim in claims:
        rows = claim.get("rows") if isinstance(claim, dict) else None
        two = isinstance(rows, list) and len(rows) == 2 and all(isinstance(label, str) for label in rows)
        if not two or not isinstance(claim.get("claim"), str) or not _is_number(claim.get("paper", 0.0)):
            raise ConfigError(
                f"claims: {claim!r} must be {{claim: TEXT, rows: [BETTER, WORSE], paper: POINTS}}, with two labels and the "
                "paper's effect or null"
            )


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _check_devices(trainer: DictConfig) -> None:
    """Refuse devices that contradict each other."""
    device, devices, accelerator = trainer.device, trainer.devices, trainer.accelerator
    if accelerator != "auto" and device != "auto" and (accelerator == "cpu") != (device == "cpu"):
        raise ConfigError(f"trainer.device={device} is no trainer.accelerator={accelerator}; leave one out")
    if ":" in device and devices != 1:
        raise ConfigError(f"trainer.device={device} is one device, but trainer.devices={devices}; leave one out")


def readable(error: Exception, overrides: Sequence[str], folders: Sequence[Path] = ()) -> Exception:
    """Error of Hydra or OmegaConf in one line; for an unknown name, with the closest ones."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for one in chain:
        if isinstance(one, MissingConfigException) and one.missing_cfg_file:
            group, _, name = one.missing_cfg_file.rpartition("/")
            if group in GROUPS:
                return UnknownName(unknown(group, name, options(group, folders)))
            if group in PLUGGED:
                return ConfigError(f"unknown {group} {name!r}; pip install 'ivtp[sweep]' brings {PLUGGED[group]}")
    given = {override.lstrip("+~").partition("=")[0]: override.partition("=")[2] for override in overrides}
    for group in GROUPS:
        if group in given and "," not in given[group] and given[group] not in options(group, folders):
            return UnknownName(unknown(group, given[group], options(group, folders)))
    for one in chain:
        if isinstance(one, OverrideParseException):
            return _unreadable(one.override)
        if not isinstance(one, OmegaConfBaseException) or not one.full_key:
            continue
        name = str(one.full_key)
        if name.startswith("hydra."):
            return ConfigError(f"{name}: {_first_line(one)}; --cfg hydra lists Hydra's keys")
        if isinstance(one, (ConfigKeyError, ConfigAttributeError)):
            # Keys of a pruner, and of one option of a group, are known after composition alone.
            return unknown_key(name, _flat(_plain(overrides, folders)) if name in given else set(schema.KEYS) - {name})
        return ConfigError(f"{name}: {_first_line(one)}")
    return ConfigError(next(filter(None, map(_first_line, chain)), type(error).__name__))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].startswith("Could not append") else 1]) if lines else ""


def _plain(overrides: Sequence[str], folders: Sequence[Path]) -> DictConfig:
    """Config with the group choices alone, to list the keys that exist."""
    groups = [_parsed(o) for o in overrides if o.lstrip("+").partition("=")[0] in GROUPS]
    choices = [f"{o.get_key_element()}={next(iter(values_of(o)))}" for o in groups]  # of a sweep the first one
    with _composing():
        return compose("config", overrides=[*choices, *search_path(folders)])


def _flat(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in config:
        yield f"{prefix}{name}"
        if isinstance(inner := config._get_node(name), DictConfig):
            yield from _flat(inner, f"{prefix}{name}.")
