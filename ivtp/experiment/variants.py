"""Rows of an experiment: `variants` of its config, with their sweeps and seeds."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ivtp.experiment.config import pruner_defaults
from ivtp.experiment.schema import ConfigError
from ivtp.registry import UnknownName, unknown

ROW_TEXTS = {
    "pruner": "the name of a pruner, with its settings beside it in the row",
    "series": "a text",
    "section": "a text",
    "paper": "a text, as in table1/IVTP",
    "stand_in": "the name of a method",
}
"""Keys of a row that are texts, with what each must be."""
VARIANT_KEYS = ("label", "series", "section", "sweep", "pruner", "budget", "position_ids", "seeds", "paper", "stand_in")


def variants(config: DictConfig) -> Iterator[dict]:
    """Rows of an experiment, as dicts: the request of each `Result`.

    A sweep may run over settings, `pruner`, `position_ids` and every kind of budget. A row's pruner starts from the composed
    one if it is the same method (so `pruner.tau=0.3` on the command line reaches all its rows), else from its own defaults.
    """
    base: Any = OmegaConf.to_container(config)
    _check(base["variants"])
    rows: list[dict[str, Any]] = base["variants"] or [{"label": "unpruned", "pruner": "none"}]
    if not base["variants"] and base["pruner"]["name"] != "none":
        rows.append({"label": base["pruner"]["name"]})
    labels = set()
    for row in rows:
        sweep = row.get("sweep") or {}
        for values in product(*sweep.values()):
            variant = _variant(row, dict(zip(sweep, values, strict=True)), base)
            if variant["label"] in labels:
                raise ConfigError(f"two rows are labelled {variant['label']!r}; name the swept keys in the label")
            labels.add(variant["label"])
            yield from _seeded(variant, row.get("seeds"))


def _variant(row: dict, swept: dict, base: dict) -> dict:
    """Request of a row for one value of each swept key; what it leaves out is that of the config `base`."""
    from ivtp.pruners.budget import KINDS, PER, chosen  # with torch, which composition does without

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
        label, series, paper = ((row.get(key) or "").format(**swept) for key in ("label", "series", "paper"))
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"label {row['label']!r}: {error} is not a key of its sweep") from error
    return {
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


def _check(rows: object) -> None:
    """Refuse a row that is not a mapping with a label, and a sweep that is not a mapping of lists."""
    if not isinstance(rows, (list, type(None))):
        raise ConfigError(f"variants={rows!r} must be a list of rows")
    for number, row in enumerate(rows or [], start=1):
        if not isinstance(row, dict) or not isinstance(row.get("label"), str):
            raise ConfigError(f"row {number} of variants, {row!r}, must have a text `label` and settings")
        for key, about in ROW_TEXTS.items():
            if not isinstance(row.get(key), (str, type(None))):
                raise ConfigError(f"row {row['label']!r}: {key}={row[key]!r} must be {about}")
        sweep = row.get("sweep") or {}
        if not isinstance(sweep, dict) or not all(isinstance(values, list) for values in sweep.values()):
            raise ConfigError(f"row {row['label']!r}: sweep={sweep!r} must name settings, each with a list of values")
        if not all(isinstance(key, str) for key in [*row, *sweep]):
            raise ConfigError(f"row {row['label']!r}: {row!r} must name its settings by texts")
        if not all(isinstance(name, str) for name in sweep.get("pruner", [])):
            raise ConfigError(f"row {row['label']!r}: the pruners of its sweep must be names, not {sweep['pruner']!r}")
        if not isinstance(row.get("budget", {}), dict):
            raise ConfigError(f"row {row['label']!r}: budget={row['budget']!r} must name its kind, as in {{keep: 16}}")
