"""Several ranks: the outcomes, metrics and tables of one process, whoever starts them, and whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.running import command, environment, lines, one_line, run

from ivtp.experiment import ranks
from ivtp.experiment.config import load_config
from ivtp.registry import RankLost, UserError

EMOJI = (
    *("model=tiny_clip", "data=emoji", "data.size=4", "data.background=photo", "pruner=layerwise", "viewer=1"),
    *("logger=none", "trainer.batch_size=2", "trainer.threads=1", "costs.models=[]", "data.limit=24"),
)


def start(*arguments: str, output: Path, **more: str) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command(*EMOJI, *arguments, f"output={output}"), env=environment(**more), cwd=output, **pipes
    )


def contents(folder: Path) -> dict:
    """What must not depend on the number of ranks: all but the throughput, in the last column of the table."""
    return {
        "table": [line.rsplit("|", 2)[0] for line in (folder / "table.md").read_text().splitlines()],
        "comparisons": (folder / "comparisons.json").read_bytes(),
        "outcomes": {path.name: path.read_bytes() for path in folder.glob("outcomes/*")},
        "metrics": [(record["label"], record["metrics"]) for record in lines(folder / "results.jsonl")],
    }


def within_a_row(process: subprocess.Popen, folder: Path, rank: int, since: float = 0) -> None:
    """Wait until a rank has written outcomes after a point in time: those of an earlier run may still lie there."""
    deadline = time.monotonic() + 120
    while not any(path.stat().st_mtime > since for path in folder.glob(f"outcomes/*.rank{rank}.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_ranks_that_stop_die_and_start_again_end_as_one_process(tmp_path):
    """Two ranks from one command are stopped by SIGTERM; then one is killed; two tasks, as srun starts them, do the rest."""
    assert run(*EMOJI, output=tmp_path / "alone", quick=False) == 0
    process, folder = start("trainer.devices=2", output=tmp_path), tmp_path / "run"
    within_a_row(process, folder, 0)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (143, "ivtp: stopped; the same command goes on from here\n")

    since, process = time.time(), start("trainer.devices=2", output=tmp_path)
    within_a_row(process, folder, 1, since)
    os.kill(int(lines(folder / ".lock.rank1.json")[0]["pid"]), signal.SIGKILL)
    out, error = process.communicate(timeout=100)
    assert process.returncode == 2, out
    assert (
        one_line(error)
        == "rank 1 has ended with SIGKILL, and the others were stopped; the same command goes on from here"
    )
    assert not (folder / ".lock.json").exists() and not (folder / "table.md").exists()

    slurm = {"SLURM_JOB_ID": f"{os.getpid() % 9000 + 1000}", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "table"}
    slurm |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost"}
    tasks = [
        start("trainer.devices=2", output=tmp_path, **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NODEID="0")
        for rank in "01"
    ]
    said = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "run: 2 rows" in said[0][0] and said[1] == ("", "") and said[0][1] == ""
    assert contents(folder) == contents(tmp_path / "alone" / "run")
    assert {record["machine"]["ranks"] for record in lines(folder / "results.jsonl")} == {2}


def test_a_request_that_does_not_fit_the_ranks_is_one_line(tmp_path, monkeypatch, capsys):
    assert run(*EMOJI, "trainer.num_nodes=2", output=tmp_path) == 2
    assert "start this one on every machine with srun" in one_line(capsys.readouterr().err)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run(*EMOJI, output=tmp_path) == 2
    assert "2 were started; set trainer.devices=2" in one_line(capsys.readouterr().err)


# Without processes --------------------------------------------------------------------------------------------------


def trainer(**changes):
    return SimpleNamespace(**{"device": "auto", "devices": 1, "accelerator": "auto", "num_nodes": 1} | changes)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with three GPUs; the device that becomes the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_ranks_are_one_per_gpu(gpus):
    assert ranks.to_launch(trainer()) == 1 and ranks.to_launch(trainer(devices="auto")) == 3
    assert ranks.to_launch(trainer(devices=2)) == 2
    assert ranks.to_launch(trainer(devices="auto", accelerator="cpu")) == 1
    assert ranks.to_launch(trainer(devices=5, device="cpu")) == 5
    with pytest.raises(UserError, match=r"trainer\.devices=4, but torch sees 3 CUDA"):
        ranks.to_launch(trainer(devices=4))


def test_the_device_is_the_one_that_was_asked_for(gpus, monkeypatch):
    assert ranks.device_of(trainer()) == "cuda" and ranks.device_of(trainer(device="cuda:2")) == "cuda:2"
    assert ranks.device_of(trainer(device="cpu")) == ranks.device_of(trainer(accelerator="cpu")) == "cpu"
    assert gpus == [0, 2]
    with pytest.raises(UserError, match=r"trainer\.device=cuda:3, but torch sees 3 CUDA"):
        ranks.device_of(trainer(device="cuda:3"))
    monkeypatch.setattr(ranks, "cluster", lambda: SimpleNamespace(local_rank=lambda: 2))
    monkeypatch.setattr(ranks, "world", lambda: 3)
    assert ranks.device_of(trainer(devices=3)) == "cuda:2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert ranks.device_of(trainer(devices=3), "auto") == "cuda" and os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_gpus_of_a_machine_are_divided_among_ranks_with_a_device_map():
    assert [ranks.portion(list("01234567"), local, 3) for local in range(3)] == [list("01"), list("234"), list("567")]
    with pytest.raises(UserError, match=r"3 ranks with model\.device_map need a CUDA device each"):
        ranks.portion(["0"], 0, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("asked", [{"device": "cuda:1"}, {"accelerator": "gpu"}])
def test_without_a_gpu_one_is_refused(asked):
    with pytest.raises(UserError, match=r"but torch sees no CUDA device here; use trainer\.\w+=cpu"):
        ranks.device_of(load_config([f"trainer.{key}={value}" for key, value in asked.items()]).trainer)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["device=tpu"], "trainer.device=tpu is not one of auto, cpu, cuda, cuda:N"),
        (["devices=0"], "trainer.devices=0 must be a whole number of at least 1, or auto"),
        (["devices=all"], "trainer.devices=all must be"),
        (["device=cpu", "accelerator=gpu"], "trainer.device=cpu is no trainer.accelerator=gpu"),
        (["device=cuda:1", "devices=2"], "trainer.device=cuda:1 is one device, but trainer.devices=2"),
        (["num_nodes=0"], "trainer.num_nodes=0 must be a whole number of at least 1"),
        (["precision=8"], "trainer.precision=8 is not one of null, 32-true"),
    ],
)
def test_devices_that_contradict_each_other_are_refused(arguments, said, tmp_path, capsys):
    assert run(*(f"trainer.{argument}" for argument in arguments), output=tmp_path) == 2
    assert said in one_line(capsys.readouterr().err)


def failure(exitcode: int, message: object = "", name: str = "") -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, message=message, signal_name=lambda: name)


def test_the_first_cause_is_said_and_not_what_followed_from_it():
    told = failure(2, {"message": "UserError: out of disk"})
    assert ranks.cause_of({0: failure(2), 1: told, 2: failure(143)}) == "out of disk"
    killed = failure(-9, name="SIGKILL")
    assert ranks.cause_of({0: failure(143), 1: failure(2), 2: killed}).startswith("rank 2 has ended with SIGKILL, ")
    assert ranks.cause_of({0: failure(143), 3: failure(1)}).startswith("rank 3 has ended with status 1, ")


def test_a_rank_whose_starter_is_dead_stops(monkeypatch):
    ranks.check()
    monkeypatch.setattr(ranks, "_parent", -1)
    with pytest.raises(RankLost, match="the process that started this rank has ended"):
        ranks.check()


def test_precision_is_part_of_the_identity(tmp_path):
    """Autocast changes outcomes: results of both must not be taken for each other."""
    for precision in ("null", "bf16-mixed"):
        assert run(*EMOJI, f"trainer.precision={precision}", "data.limit=4", output=tmp_path) == 0
    records = lines(tmp_path / "run" / "results.jsonl")
    assert len({record["key"] for record in records}) == 4
    assert [record["model"].get("precision") for record in records] == [None, None, "bf16-mixed", "bf16-mixed"]
