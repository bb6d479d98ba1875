"""Load a task of lmms-eval: its own definition, on the documents of the hub or of a local copy."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

from ivtp.data.failures import DataError, first_line
from ivtp.lmms.judges import judge_environment
from ivtp.registry import UnknownName, unknown

PLAIN = "ivtp"
"""Model name for lmms-eval; no task has a prompt preset of that name, so its default holds."""


def load_task(
    name: str,
    path: str | None = None,
    preset: str = "default",
    prompt: Mapping | None = None,
    chat: bool = False,
    judge: Mapping[str, str] | None = None,
):
    """Load the task object of lmms-eval; its `commits` are the commits of its data sets on the hub.

    path    a folder with a copy of the data set, in the hub's own schema, or another hub id; default: the task's own
    preset  name of a prompt: "default", or a model that the task has a prompt for
    prompt  single settings that replace those of the prompt
    chat    prompts are messages
    Raises DataError, in one line, for a task that does not exist or cannot be run here.
    """
    index = task_index()
    if name not in index:
        raise UnknownName(unknown("task of lmms-eval:", name, index))
    entry = index[name]
    if entry["type"] != "task":
        members = member_names(entry)
        raise DataError(
            f"{name!r} is a {entry['type'].replace('_', ' ')} of lmms-eval, not one task; choose of {members}"
        )
    with judge_environment(judge):
        config = read_config(name, entry["yaml_path"])
        check_supported(name, config)
        set_prompt(name, config, preset, prompt or {})
        own = config.get("dataset_path")
        if path is not None:
            relocate(config, path)
        commits: dict[str, str] = {}
        within = partial(loading, own, path, commits)
        task = instantiate(name, config, PLAIN if preset == "default" else preset, chat, within)
        task.commits = commits
        return task


@cache
def task_index() -> dict[str, dict]:
    """Tasks, groups and tags of the installed lmms-eval, by name."""
    try:
        import lmms_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataError('data=lmms needs lmms-eval; pip install "ivtp[lmms]"') from error
    import datasets
    from loguru import logger
    from PIL import ImageFile

    # Undo what its import sets for the whole process: opening truncated images, and writing to the console.
    with patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES):
        from lmms_eval.tasks import TaskManager
    logger.remove()
    datasets.disable_progress_bars()
    return TaskManager("ERROR").task_index


def member_names(entry: dict) -> str:
    """Tasks of a group or tag, as text."""
    from lmms_eval.utils import load_yaml_config

    if entry["type"] == "python_task":
        return "those that are defined by a YAML alone"
    members = entry["task"] if entry["type"] == "tag" else load_yaml_config(entry["yaml_path"], mode="simple")["task"]
    return ", ".join(str(member.get("task") if isinstance(member, dict) else member) for member in members)


def read_config(name: str, path: str) -> dict:
    """Read the YAML of a task with its functions."""
    from lmms_eval.utils import load_yaml_config

    try:
        return load_yaml_config(path, mode="full")
    except Exception as error:  # anything: it runs the task's own module
        raise DataError(f"task {name!r} of lmms-eval cannot be loaded: {first_line(error)}") from error


def check_supported(name: str, config: dict) -> None:
    """Raise DataError for a task that needs more than one answer to one prompt about images."""
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
    """Check the preset, and replace single settings of its prompt."""
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
    """Set the source of the documents: a folder (parquet as on the hub, or written by `save_to_disk`) or another hub id."""
    folder, more = Path(path), dict(config.get("dataset_kwargs") or {})
    if not folder.is_dir() and (folder.is_absolute() or path.startswith(".") or path.count("/") != 1):
        raise DataError(f"data.path={path} does not exist; give a folder with a copy of {config.get('dataset_path')}")
    if (folder / "dataset_dict.json").is_file():
        more["load_from_disk"], config["dataset_path"] = True, path
    else:
        config["dataset_path"], config["dataset_name"] = locate_part(path, config.get("dataset_name"))
    config["dataset_kwargs"] = more


@contextmanager
def loading(own: str | None, copy: str | None, commits: dict[str, str]) -> Iterator[None]:
    """Context in which a task's code loads data sets: without a login, and from the copy given for its own hub id.

    Tasks set token=True, which fails without a login although most data sets are public. `commits` is filled with the
    commit of each data set from the hub.
    """
    import datasets.load
    from huggingface_hub import get_token

    build = datasets.load.load_dataset_builder

    def load_builder(path: str, name: str | None = None, *, token: str | bool | None = None, **more):
        source, part = (path, name) if copy is None or path != own else locate_part(copy, name)
        builder = build(source, part, token=None if token is True and get_token() is None else token, **more)
        if not Path(source).is_dir() and re.fullmatch("[0-9a-f]{40}", str(builder.hash)):
            commits[source] = str(builder.hash)
        return builder

    with patch.object(datasets.load, "load_dataset_builder", load_builder):
        yield


def locate_part(path: str, part: str | None) -> tuple[str, str | None]:
    """Path and name of a part of a data set.

    In a folder: as its README declares the part, else a subfolder of the part's name, else the whole folder.
    """
    import datasets

    folder = Path(path)
    if part is None or not folder.is_dir() or part in datasets.get_dataset_config_names(path):
        return path, part
    return str(folder / part) if (folder / part).is_dir() else path, None


def instantiate(name: str, config: dict, model: str, chat: bool, loading: Callable[[], AbstractContextManager]):
    """Make the task object; its data set is loaded in one attempt, not lmms-eval's five.

    loading  context in which its code may load data sets; also an attribute of the task object
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
