"""lmms-eval's own evaluation, for the tests to compare with: of answers that are known, and of a command in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from argparse import Namespace
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import yaml

from helpers.benchmark_data import write
from helpers.running import ROOT, environment
from ivtp.experiment.config import load_config
from ivtp.lmms.dataset import THOUGHTS

CLEAR = {"pre_prompt": "", "post_prompt": ""}
"""Prompts in words that the embedded model knows."""


@cache
def folder(name: str) -> Path:
    """The made-up data set of a config."""
    return write(name, Path(tempfile.mkdtemp(prefix=f"ivtp-{name}-")))


@contextmanager
def caches():
    """Where `datasets` and lmms-eval put what they prepare: nothing of a test stays in the home folder."""
    import datasets

    from ivtp.lmms.loading import task_index

    task_index()  # it minds what lmms-eval sets for the whole process
    from lmms_eval.api import task

    with tempfile.TemporaryDirectory(prefix="ivtp-datasets-") as place:
        datasets.disable_progress_bars()
        task._resolve_hf_datasets_cache_dir.cache_clear()
        with (
            patch.object(datasets.config, "HF_DATASETS_CACHE", place),
            patch.dict(os.environ, LMMS_EVAL_DATASETS_CACHE=place, LMMS_EVAL_HOME=place),
        ):
            yield place
        task._resolve_hf_datasets_cache_dir.cache_clear()


def definition(config: str, prompt: dict | None = None, **changes) -> dict:
    """The YAML with which lmms-eval itself runs a config's task on the made-up documents, as its users would write it."""
    from ivtp.lmms.loading import locate_part, task_index

    data = load_config([f"data={config}"]).data
    path = task_index()[data.task]["yaml_path"]
    from lmms_eval.utils import load_yaml_config

    own = load_yaml_config(path, mode="simple")
    place, part = locate_part(str(folder(config)), own.get("dataset_name"))
    known = own.get("lmms_eval_specific_kwargs", {}).get("default", {})
    prompts = {"default": {**known, **(data.prompt or {}), **(prompt or {})}}
    more = {"lmms_eval_specific_kwargs": prompts} if known else {}
    return {"include": path, "task": f"{data.task}_here", "dataset_path": place, "dataset_name": part,
            "dataset_kwargs": None, **more, **changes}  # fmt: skip


def replay(definition: dict, answers: dict[int, str], output: Path) -> dict[str, float]:
    """Metric → value, as lmms-eval's evaluator works it out of these answers."""
    import datasets
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    class Replay(lmms):
        def generate_until(self, requests):
            return [answers[request.doc_id] for request in requests]

        loglikelihood = generate_until_multi_round = generate_until

        def clean(self):
            """It holds no model that memory must be freed of."""

    place = output / "tasks"
    place.mkdir(parents=True, exist_ok=True)
    (place / "task.yaml").write_text(yaml.safe_dump(definition))
    manager = TaskManager("ERROR", include_path=str(place), include_defaults=False, model_name="ivtp")
    args = Namespace(output_path=str(output), process_with_media=False, reasoning_tags=json.dumps(THOUGHTS))
    load, hub = datasets.load_dataset, "lmms-lab-encoder/GQA"

    def near(path, name=None, **more):
        """GQA loads its images from the hub by itself: here they are in the folder."""
        if path == hub:
            path, more = str(folder("gqa")), {**more, "token": None}
        return load(path, name, **more)

    with patch("datasets.load_dataset", near), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        found = simple_evaluate(
            Replay(),
            tasks=[definition["task"]],
            task_manager=manager,
            cli_args=args,
            bootstrap_iters=0,
            log_samples=False,
        )
    values = found["results"][definition["task"]]
    return {
        name.removesuffix(",none"): value
        for name, value in values.items()
        if name.endswith(",none") and "_stderr" not in name and isinstance(value, (int, float))
    }


@cache
def installed() -> str:
    """A folder with what an installation of this checkout says of itself, entry points included: out of its wheel."""
    place = Path(tempfile.mkdtemp(prefix="ivtp-installed-"))
    code = f"from hatchling.build import build_wheel; build_wheel({str(place)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place, [name for name in archive.namelist() if ".dist-info/" in name])
    return str(place)


def command(arguments: list[str], cache: str, ranks: int = 1) -> subprocess.CompletedProcess:
    """`lmms-eval` with arguments, where this checkout is installed; with several ranks, by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    path = os.pathsep.join([str(ROOT), installed(), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = environment(PYTHONPATH=path, HF_DATASETS_CACHE=cache, LMMS_EVAL_DATASETS_CACHE=cache, LMMS_EVAL_HOME=cache)
    return subprocess.run(
        [sys.executable, *torchrun, "-m", "lmms_eval", *arguments], cwd=cache, env=env, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, check=False, timeout=300,
    )  # fmt: skip
