"""Load a task of lmms-eval: its own definition, on the documents of the hub or of a local copy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

from ivtp.data.errors import DataError, first_line
from ivtp.data.judges import environment
from ivtp.registry import UnknownName, unknown

PLAIN = "ivtp"
"""What lmms-eval is told the model is: no task has a prompt preset of that name, so its default holds."""


def load_task(
    name: str,
    path: str | None = None,
    preset: str = "default",
    prompt: Mapping | None = None,
    chat: bool = False,
    judge: Mapping[str, str] | None = None,
):
    """The task object of lmms-eval; its `commits` say at which commits of the hub its data sets are.

    path    a folder with a copy of the data set, in the hub's own schema, or another hub id; default: the task's own
    preset  which of its prompts: "default", or a model that the task has one for
    prompt  single settings of that prompt, over its own
    chat    its prompts are messages
    Raises DataError, in one line, for what is not there or cannot be run here.
    """
    index = task_index()
    if name not in index:
        raise UnknownName(unknown("task of lmms-eval:", name, index))
    entry = index[name]
    if entry["type"] != "task":
        members = listed(entry)
        raise DataError(
            f"{name!r} is a {entry['type'].replace('_', ' ')} of lmms-eval, not one task; choose of {members}"
        )
    with environment(judge):
        config = read(name, entry["yaml_path"])
        refuse(name, config)
        set_prompt(name, config, preset, prompt or {})
        own = config.get("dataset_path")
        if path is not None:
            relocate(config, path)
        commits: dict[str, str] = {}
        within = partial(loading, own, path, commits)
        task = make(name, config, PLAIN if preset == "default" else preset, chat, within)
        task.commits = commits
        return task


@cache
def task_index() -> dict[str, dict]:
    """Every task, group and tag of the lmms-eval that is installed."""
    try:
        import lmms_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataError('data=lmms needs lmms-eval; pip install "ivtp[lmms]"') from error
    import datasets
    from loguru import logger
    from PIL import ImageFile

    # What it sets for the whole process when it is imported: it opens half an image, and writes to the console.
    with patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES):
        from lmms_eval.tasks import TaskManager
    logger.remove()
    datasets.disable_progress_bars()
    return TaskManager("ERROR").task_index


def listed(entry: dict) -> str:
    """The tasks of a group or tag, as text."""
    from lmms_eval.utils import load_yaml_config

    if entry["type"] == "python_task":
        return "those that are defined by a YAML alone"
    members = entry["task"] if entry["type"] == "tag" else load_yaml_config(entry["yaml_path"], mode="simple")["task"]
    return ", ".join(str(member.get("task") if isinstance(member, dict) else member) for member in members)


def read(name: str, path: str) -> dict:
    """The task's YAML with its functions."""
    from lmms_eval.utils import load_yaml_config

    try:
        return load_yaml_config(path, mode="full")
    except Exception as error:  # anything: it runs the task's own module
        raise DataError(f"task {name!r} of lmms-eval cannot be loaded: {first_line(error)}") from error


def refuse(name: str, config: dict) -> None:
    """What an answering vision-language model cannot be asked."""
    kind = config.get("output_type", "generate_until")
    if kind != "generate_until":
        raise DataError(f"task {name!r} is of the kind {kind!r}; here a model answers one prompt (generate_until)")
    more = config.get("dataset_kwargs") or {}
    if more.get("video") or more.get("From_YouTube"):
        raise DataError(f"task {name!r} asks about videos; only images can be pruned here")
    if (config.get("repeats") or 1) > 1:
        raise DataError(
            f"task {name!r} samples {config['repeats']} answers to each question; here each is answered once"
        )


def set_prompt(name: str, config: dict, preset: str, prompt: Mapping) -> None:
    """Check the preset, and put single settings over its own."""
    known = config.get("lmms_eval_specific_kwargs") or {}
    nested = {key: value for key, value in known.items() if isinstance(value, dict)}
    if preset != "default" and preset not in nested:
        raise UnknownName(unknown(f"prompt preset of task {name!r}:", preset, {"default", *nested}))
    chosen = nested.get(preset, nested.get("dataset", known))
    for key, value in prompt.items():
        if key not in chosen:
            raise UnknownName(unknown(f"setting of the prompt of task {name!r}:", key, chosen))
        chosen[key] = value


def relocate(config: dict, path: str) -> None:
    """Take the documents from a folder (parquet as on the hub, or what `save_to_disk` wrote) or another hub id."""
    folder, more = Path(path), dict(config.get("dataset_kwargs") or {})
    if not folder.is_dir() and (folder.is_absolute() or path.startswith(".") or path.count("/") != 1):
        raise DataError(f"data.path={path} does not exist; give a folder with a copy of {config.get('dataset_path')}")
    if (folder / "dataset_dict.json").is_file():
        more["load_from_disk"], config["dataset_path"] = True, path
    else:
        config["dataset_path"], config["dataset_name"] = located(path, config.get("dataset_name"))
    config["dataset_kwargs"] = more


@contextmanager
def loading(own: str | None, copy: str | None, commits: dict[str, str]) -> Iterator[None]:
    """Within, whatever a task's code loads of the hub by `datasets` (its documents, or others that belong to them) needs no
    login, and its own hub id means the copy given for it. `commits` gets the commit of each data set of the hub.

    Tasks say token=True, which fails for whoever is not logged in, though most data sets are public.
    """
    import datasets.load
    from huggingface_hub import get_token

    build = datasets.load.load_dataset_builder

    def anyone(path: str, name: str | None = None, *, token: str | bool | None = None, **more):
        found = (path, name) if copy is None or path != own else located(copy, name)
        builder = build(*found, token=None if token is True and get_token() is None else token, **more)
        if not Path(found[0]).is_dir() and re.fullmatch("[0-9a-f]{40}", str(builder.hash)):
            commits[found[0]] = builder.hash
        return builder

    with patch.object(datasets.load, "load_dataset_builder", anyone):
        yield


def located(path: str, part: str | None) -> tuple[str, str | None]:
    """Where a part of a data set is: as the folder's README declares it, else in a folder of the part's name, else in it
    all."""
    import datasets

    folder = Path(path)
    if part is None or not folder.is_dir() or part in datasets.get_dataset_config_names(path):
        return path, part
    return str(folder / part) if (folder / part).is_dir() else path, None


def make(name: str, config: dict, model: str, chat: bool, loading: Callable[[], AbstractContextManager]):
    """The task object; its data set is loaded once, without lmms-eval's five attempts.

    loading  the context in which its code may load data sets; the task object has it as `loading`
    """
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

    base = ConfigurableMessagesTask if chat else ConfigurableTask

    def download(task, dataset_kwargs=None) -> None:
        base.download.__wrapped__(task, dataset_kwargs)
        split = task.config.test_split or task.config.validation_split
        if split not in task.dataset:
            raise DataError(f"it has no split {split!r}, but {', '.join(task.dataset)}")

    once = {"download": download, "process_results": base.process_results.__wrapped__, "loading": staticmethod(loading)}
    where, parts = config.get("dataset_path"), config.get("dataset_name")
    try:
        with loading():
            return type(base.__name__, (base,), once)(config=config, model_name=model)
    except Exception as error:  # of the network, of the hub, of the schema, of the task's own code
        copy = f"hf download {where} --repo-type dataset --local-dir FOLDER"
        hint = "" if Path(str(where)).exists() else f"; offline, give data.path=FOLDER, a copy made by `{copy}`"
        if "gated" in str(error):
            hint = f"; accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN{hint}"
        part = f" ({parts})" if parts else ""
        raise DataError(f"data set {where}{part} of task {name!r}: {first_line(error)}{hint}") from error
