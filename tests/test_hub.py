"""First contact: everything by hub ids, from a hub on the loopback address that has tiny models under the real names."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub.repositories import ORIGINALS, fill, llava_1_5
from helpers.hub.server import TOKEN, Hub
from helpers.hub.shell import Done, Shell
from helpers.running import FIRST_RUN, ROOT, environment, lines, one_line

from ivtp.backbones.family import language_families
from ivtp.experiment.config import load_config, options

CLOSED = "http://127.0.0.1:9"
"""Where nobody answers."""
LLAVA, CLIP, POPE = "llava-hf/llava-1.5-7b-hf", "timm/vit_large_patch14_clip_336.openai", "lmms-lab-encoder/POPE"
QUICK = ("data=pope", "debug=limit", "logger=none")
SIBLINGS = {
    "llava_1_5_13b": ["pruner=cdpruner"],
    "llava_next_7b": ["pruner=ivtp"],
    "llava_onevision_7b": ["pruner=ivtp", "pruner.reference=last"],
    "qwen2_5_vl_7b": ["pruner=fastv"],
    "qwen3_vl_8b": ["pruner=ivtp", "pruner.reference=last"],
    "internvl3_8b": ["pruner=visionzip"],
}
"""Every other config of a language-vision model, with a pruner that its family supports."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A user's home and working folder, empty at first."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def hub(place) -> Iterator[Hub]:
    made = Hub()
    fill(made, place / "a_pickle_was_opened")
    yield made
    made.close()


def user(place: Path, endpoint: str, **more: str) -> dict[str, str]:
    """The environment of somebody who has set nothing but the endpoint, and whose cache is below `place`."""
    dropped = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "LMMS_", "WANDB_", "http", "HTTP", "ALL_PROXY", "all_proxy")
    kept = {name: value for name, value in environment().items() if not name.startswith(dropped)}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [kept.get("PYTHONPATH")])])
    # No name server is needed; a machine without one need not wait for it.
    new = {"HF_ENDPOINT": endpoint, "HF_HOME": str(place / "huggingface"), "RES_OPTIONS": "timeout:1 attempts:1"}
    return {**kept, "PYTHONPATH": paths, **new, **more}


def terminal(line: str, place: Path, endpoint: str) -> Done:
    """A line as it stands, in a shell whose `python` is this one."""
    python = place / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    env = user(place, endpoint)
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"
    given = {"cwd": place, "env": env, "capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, **given)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def shells(hub, place) -> Iterator[dict[str, Shell]]:
    """Processes of a user: as it is, with HF_HUB_OFFLINE=1, and where the hub cannot be reached."""
    offline = user(place, hub.endpoint, HF_HUB_OFFLINE="1")
    environments = {"online": user(place, hub.endpoint), "offline": offline, "unreachable": user(place, CLOSED)}
    made = {name: Shell(env, place) for name, env in environments.items()}
    yield made
    for shell in made.values():
        shell.close()


@pytest.fixture
def shell(shells) -> Shell:
    return shells["online"]


def results(folder: Path) -> list[dict]:
    return lines(folder / "run" / "results.jsonl")


def fine(done: Done) -> Done:
    assert done.status == 0, done.err
    assert "Traceback" not in done.out + done.err
    return done


def fetched(asked: list[str]) -> list[str]:
    """The files whose content was sent."""
    return [request.split("/")[-1] for request in asked if re.match("GET /(api/resolve-cache|cdn)/", request)]


# The README's first run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(hub, shells, place) -> dict[str, list]:
    """The README's lines one after another: what was asked of the hub for each, and how each ended. The one that fetches
    everything runs in a terminal, the others in processes that are there already."""
    asked, done = [], []
    for number, line in enumerate(FIRST_RUN):
        with hub.watched() as requests:
            offline, module, rest = re.fullmatch(r"(HF_HUB_OFFLINE=1 )?python -m (\S+) (.*)", line).groups()
            if number == 1:
                done.append(terminal(line, place, hub.endpoint))
            else:
                shell = shells["offline" if offline else "online"]
                done.append(shell.run(*shlex.split(rest, comments=True), module=module))
        asked.append(requests)
    return {"asked": asked, "done": done}


def test_the_five_lines_of_the_readme_run(first, place):
    assert len(FIRST_RUN) == 5
    for line, done in zip(FIRST_RUN, first["done"], strict=True):
        assert done.status == 0, f"{line}: {done.err}"
        assert "Traceback" not in done.out + done.err
    assert (place / "outputs" / "run" / "table.md").is_file()


def test_the_first_run_records_which_commits_it_used(first, hub, place):
    record = next(record for record in results(place / "outputs") if record["pruner"]["name"] == "ivtp")
    assert record["model"]["source"] == LLAVA
    assert record["model"]["hash"] == hub[LLAVA].main
    assert record["text_encoder"] == {"source": CLIP, "hash": hub[CLIP].main}
    assert record["data"]["commits"] == {POPE: hub[POPE].main}
    assert record["model"]["image_padding"] == "pad"
    assert record["words"]["n"] == 8  # CLIP has read every question
    assert record["tokens"][-1] == 5  # a ninth of the 49 that the checkpoint has, not of the 576 of the config


def test_no_pickle_is_fetched_and_nobody_is_asked_to_convert_one(first, hub, place):
    asked = [request for requests in first["asked"] for request in requests]
    assert not [request for request in asked if ".bin" in request or ".h5" in request]
    assert not [request for request in asked if "discussions" in request or "/commits" in request]
    assert not [request for request in asked if request.startswith("POST") and "paths-info" not in request]
    assert not [request for request in asked if "openai/clip" in request]
    assert not (place / "a_pickle_was_opened").exists()


def test_every_file_is_fetched_once(first):
    got = [name for requests in first["asked"] for name in fetched(requests)]
    assert {name for name in got if name.endswith((".safetensors", ".parquet"))} == {
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "open_clip_model.safetensors",
        "test-00000-of-00001.parquet",
    }
    weights = [name for name in got if name.endswith((".safetensors", ".parquet"))]
    assert len(weights) == len(set(weights))


def test_offline_the_last_line_asks_nothing_and_evaluates_nothing(first, place):
    assert "HF_HUB_OFFLINE=1" in FIRST_RUN[-1]
    assert first["asked"][-1] == []
    assert not re.search(r"\d questions/s", first["done"][-1].out)  # as a row says when it is done
    assert re.search(r"\d questions/s", first["done"][1].out)
    assert len(results(place / "outputs")) == 3  # unpruned, ivtp, fastv


def test_the_first_download_is_announced(first):
    assert re.search(rf"fetching {LLAVA} from http://127.0.0.1:\d+: .*MB", first["done"][1].err)


def test_what_the_cache_has_runs_while_the_hub_cannot_be_reached(first, shells):
    """The benchmark's documents would do too, after five attempts of `datasets` that take 23 seconds."""
    settings = ["pruner=ivtp", "data=scenes2", "data.limit=3", "logger=none", "output=unreachable"]
    fine(shells["unreachable"].run("model=llava_1_5_7b", *settings))


@pytest.mark.parametrize(("where", "words"), [("offline", "HF_HUB_OFFLINE"), ("unreachable", "cannot be reached")])
def test_without_a_hub_what_the_cache_lacks_is_one_line(where, words, shells, hub):
    with hub.watched() as asked:
        done = shells[where].run("model=llava_1_5_7b", "model.source=someone/else", *QUICK, "output=nothing")
    assert done.status == 2 and not asked
    said = one_line(done.err)
    assert "someone/else" in said and words in said and (where == "offline" or CLOSED in said)


# All families ------------------------------------------------------------------------------------------------------


def test_every_config_of_a_language_vision_model_has_its_stand_in(hub):
    configs = {name: load_config([f"model={name}"]).model for name in options("model")}
    language = {name for name, c in configs.items() if "library" not in c and c.source != "tiny"}
    assert language == {"llava_1_5_7b", *SIBLINGS}
    kinds = {configs[name].config.model_type for name in language}
    assert kinds <= set(language_families())
    for name in language:
        assert hub[configs[name].source].files


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_run_by_their_hub_ids(name, hub, shell, place):
    done = fine(shell.run(f"model={name}", *SIBLINGS[name], *QUICK, f"output={name}"))
    assert "Written: " in done.out
    unpruned, pruned = results(place / name)
    assert pruned["model"]["hash"] == hub[load_config([f"model={name}"]).model.source].main
    assert unpruned["metrics"]["accuracy"]["n"] == pruned["metrics"]["accuracy"]["n"] == 8
    assert pruned["tflops"]["total"] < unpruned["tflops"]["total"]
    with hub.watched() as asked:
        fine(shell.run(f"model={name}", *SIBLINGS[name], *QUICK, f"output={name}"))
    assert fetched(asked) == []
    assert len(results(place / name)) == 2


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("clip_vit_b16", "timm/vit_base_patch16_clip_224.openai"),
        ("open_clip_b16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
    ],
)
def test_encoders_of_open_clip_run_by_their_hub_ids(name, repository, hub, shell, place):
    with hub.watched() as asked:
        fine(shell.run(f"model={name}", "data=emoji", "pruner=topk", "debug=limit", "logger=none", f"output={name}"))
    assert [file for file in fetched(asked) if file.endswith((".safetensors", ".bin"))] == [
        "open_clip_model.safetensors"
    ]
    assert results(place / name)[-1]["model"]["hash"] == hub[repository].main
    assert not (place / "a_pickle_was_opened").exists()


# What moves, what is slow, what is wrong ------------------------------------------------------------------------------


def test_a_commit_that_moves_is_evaluated_anew(hub, shell, place):
    command = ["model=llava_1_5_7b", "model.source=someone/moving", "pruner=fastv", *QUICK, "output=moving"]
    repository = hub["someone/moving"]
    fine(shell.run(*command))
    old = repository.main
    repository.commit(llava_1_5(seed=9))
    fine(shell.run(*command))
    records = results(place / "moving")
    assert [record["model"]["hash"] for record in records] == [old, old, repository.main, repository.main]
    assert len({record["key"] for record in records}) == 4
    fine(shell.run(*command, f"model.revision={old}"))  # the old one by its id: its results are there
    assert len(results(place / "moving")) == 4


def test_a_checkpoint_of_other_sizes_runs_as_it_is(shell, place):
    """Not with the sizes in the YAML, which are of another checkpoint; its tower needs a CLIP of its own."""
    command = ["model=llava_1_5_7b", "model.source=someone/wider", *QUICK, "output=wider"]
    fine(shell.run(*command, "pruner=topk", "pruner.group=2"))
    assert max(layer for layer, *_ in results(place / "wider")[-1]["cuts"]["vision"]) < 5
    counted = fine(shell.run(*command[:2], "pruner=topk", "pruner.group=2", "text=40", "json=true", module="ivtp.cost"))
    assert json.loads(counted.out)["tokens"][0] == 49
    done = shell.run(*command, "pruner=ivtp")
    assert done.status == 2
    said = one_line(done.err[done.err.rindex("ivtp: ") :])
    assert CLIP in said and "width 24" in said and "has 36" in said and "model.text_encoder" in said


def test_a_benchmark_that_moves_is_evaluated_anew(hub, shell, place):
    command = ["model=llava_1_5_7b", "pruner=fastv", *QUICK, "output=benchmark"]
    repository = hub[POPE]
    fine(shell.run(*command))
    repository.commit(repository.files | {"README.md": repository.files["README.md"] + b"A note.\n"})
    fine(shell.run(*command))
    assert len(results(place / "benchmark")) == 4


def test_a_slow_download_shows_its_progress(shell):
    command = ["model=llava_1_5_7b", "model.source=someone/slow", "pruner=fastv", *QUICK, "output=slow"]
    done = fine(shell.run(*command, watched=True))
    assert re.search(r"fetching someone/slow from http\S+: \d+ files, [\d.]+ MB", done.err)
    assert re.search(r"[^0-9][1-9]\d?%\|", done.err)  # on the way


def test_a_gated_repository_opens_with_a_login(shell):
    command = ["model=llava_1_5_7b", "model.source=someone/gated", "pruner=fastv", *QUICK, "output=gated"]
    done = shell.run(*command)
    assert done.status == 2
    said = one_line(done.err)
    assert "someone/gated is gated" in said and "hf auth login" in said
    fine(shell.run(*command, HF_TOKEN=TOKEN))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.source=someone/nowhere"], ["someone/nowhere", "spelling"]),
        (["model.source=someone/moving", "model.revision=v7"], ["someone/moving", "no revision 'v7'"]),
        (["model.source=someone/pickles"], ["someone/pickles", "safetensors", "pickle"]),
        (["model.source=weights/llava"], ["weights/llava", "neither a folder here nor"]),
        (["model.text_encoder=openai/clip-vit-large-patch14-336"], ["open_clip:ViT-L-14-336-quickgelu@openai"]),
        (["data.path=someone/nothing"], ["someone/nothing", "doesn't exist"]),
        (["data.path=someone/gated_pope"], ["someone/gated_pope", "gated", "hf auth login"]),
        *([[f"model.source={name}"], ["-hf form", form]] for name, (_, _, form) in ORIGINALS.items()),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_what_is_wrong_is_one_line(settings, words, hub, shell, place, tmp_path):
    with hub.watched() as asked:
        done = shell.run("model=llava_1_5_7b", "pruner=ivtp", *QUICK, *settings, f"output={tmp_path}")
    assert done.status == 2
    said = one_line(done.err[done.err.rindex("ivtp: ") :])
    assert all(word in said for word in words), said
    assert not [name for name in fetched(asked) if name.endswith((".bin", ".h5", ".py"))]
    assert not (place / "a_pickle_was_opened").exists()
    assert not (tmp_path / "run" / "results.jsonl").exists()  # before any row is evaluated
