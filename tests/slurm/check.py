"""Experiments under Slurm end as without it: `make slurm`, which starts a cluster of this machine, runs this file in it.

Four jobs of a multirun by submitit; one job of two tasks by srun, of which one is killed, and its second start; a job that
is requeued while it works; a job array. All are compared with a run without Slurm: outcomes byte for byte, metrics and
table. Prints what it does, as in experiments/scale/slurm.txt.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

ROWS = "variants=[{label: unpruned, pruner: none}, {label: topk, pruner: topk}, {label: random, pruner: random}]"
COMMON = ["data.scenes=12", "trainer.batch_size=4", "trainer.threads=1", "viewer=1", "logger=none", "costs.models=[]"]
PRUNERS = ("topk", "random", "tome", "divprune")
FOLDER = Path(mkdtemp(prefix="ivtp-slurm-"))


def ivtp(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ivtp.run", *arguments, *COMMON]


def shell(*command: str) -> str:
    shown = " ".join(f"'{part}'" if set(part) & set(" [{") else part for part in command)
    print(f"$ {shown.replace(sys.executable, 'python').replace(str(FOLDER), '.')}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def submit(name: str, command: list[str], *options: str) -> str:
    """Submit a batch job; return its id."""
    script = FOLDER / f"{name}.sh"
    script.write_text("#!/bin/bash\nexec " + " ".join(f"'{part}'" for part in command) + "\n")
    log = f"--output={FOLDER}/{name}.%j.log"
    return shell("sbatch", "--parsable", f"--job-name={name}", "--open-mode=append", log, *options, str(script))


def until(condition: Callable[[], object], what: str, seconds: float = 900) -> None:
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            sys.exit(f"{what}: not within {seconds:.0f} s\n" + "".join(p.read_text() for p in FOLDER.glob("*.log")))
        time.sleep(0.02)


def state(job: str) -> str:
    """State of a job; of an array one per task."""
    told = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=False)
    states = [word.removeprefix("JobState=") for word in told.stdout.split() if word.startswith("JobState=")]
    return " ".join(states)


def ended(job: str) -> bool:
    return not set(state(job).split()) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"}


def finish(job: str, wanted: str) -> None:
    until(lambda: ended(job), f"job {job}")
    print(f"job {job}: {state(job)}")
    if set(state(job).split()) != {wanted}:
        sys.exit("".join(path.read_text() for path in FOLDER.glob(f"*.{job.split('_')[0]}.log")))


def contents(folder: Path) -> tuple:
    """Outcomes, metrics and table of a run; its last column is the throughput."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    outcomes = {record["label"]: (folder / "outcomes" / f"{record['key']}.jsonl").read_bytes() for record in records}
    table = [line.rsplit("|", 2)[0] for line in (folder / "table.md").read_text().splitlines()]
    return outcomes, {record["label"]: record["metrics"] for record in records}, table


def same(folder: Path, reference: Path, what: str) -> None:
    ours, theirs = contents(folder), contents(reference)
    if ours != theirs:
        sys.exit(f"{what}: differs from the run without Slurm: {folder} and {reference}")
    print(f"{what}: {len(ours[0])} rows, the same outcomes, metrics and table as without Slurm\n", flush=True)


def two_tasks(reference: Path) -> None:
    """One job of two tasks: one of them is killed, and the job is submitted again."""
    output = FOLDER / "tasks"
    command = ["srun", "--kill-on-bad-exit=1", *ivtp(ROWS, "trainer.devices=2", f"output={output}")]
    options = ("--nodes=1", "--ntasks-per-node=2")
    job = submit("tasks", command, *options)
    until(lambda: list(output.glob("run/outcomes/*.rank1.jsonl")), "outcomes of the second task")
    pid = json.loads((output / "run" / ".lock.rank1.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    print("killed the second task within a row")
    finish(job, "FAILED")
    log = (FOLDER / f"tasks.{job}.log").read_text()
    print("".join(f"  {line}\n" for line in log.splitlines() if line.startswith(("ivtp:", "srun: error"))), end="")
    finish(submit("tasks", command, *options), "COMPLETED")
    same(output / "run", reference, "srun, two tasks, one killed, started again")


def requeued(reference: Path) -> None:
    """A job that Slurm stops and queues again, as when a dearer one needs its place."""
    output = FOLDER / "requeued"
    job = submit("requeued", ivtp(ROWS, f"output={output}"), "--requeue")
    until(lambda: list(output.glob("run/outcomes/*.rank0.jsonl")), "outcomes of the job")
    shell("scontrol", "requeue", job)
    until(lambda: "Restarts=1" in shell_quietly("scontrol", "show", "job", job), "second start")
    # A job that is requeued waits for two minutes, unless it is told to start.
    shell("scontrol", "update", f"JobId={job}", "StartTime=now")
    finish(job, "COMPLETED")
    log = (FOLDER / f"requeued.{job}.log").read_text()
    print("".join(f"  {line}\n" for line in log.splitlines() if line.startswith("ivtp:")), end="")
    same(output / "run", reference, "requeued within a row")


def shell_quietly(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def array(references: dict[str, Path]) -> None:
    """A job array, one pruner per task."""
    script = FOLDER / "array.sh"
    command = " ".join(f"'{part}'" for part in ivtp())
    script.write_text(
        f"#!/bin/bash\npruners=({' '.join(references)})\npruner=${{pruners[$SLURM_ARRAY_TASK_ID]}}\n"
        f"exec {command} pruner=$pruner output={FOLDER}/array/$pruner\n"
    )
    job = shell(
        "sbatch", "--parsable", f"--array=0-{len(references) - 1}", f"--output={FOLDER}/array.%A.log", str(script)
    )
    finish(job, "COMPLETED")
    for pruner, reference in references.items():
        same(FOLDER / "array" / pruner / "run", reference, f"job array, pruner={pruner}")


def multirun(references: dict[str, Path]) -> None:
    """A multirun whose jobs submitit hands to Slurm."""
    output = FOLDER / "multirun"
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=null"]
    shell(*ivtp("-m", *launcher, "hydra.launcher.timeout_min=30", f"pruner={','.join(references)}", f"output={output}"))
    for pruner, reference in references.items():
        (folder,) = (path.parent for path in output.rglob("results.jsonl") if f"pruner={pruner}" in str(path.parent))
        same(folder, reference, f"multirun by submitit, pruner={pruner}")


def main() -> None:
    steps = sys.argv[1:] or ["tasks", "requeue", "array", "multirun"]
    print(f"without Slurm, in {FOLDER}:")
    shell(*ivtp(ROWS, f"output={FOLDER}/alone"))
    print(flush=True)
    if "tasks" in steps:
        two_tasks(FOLDER / "alone" / "run")
    if "requeue" in steps:
        requeued(FOLDER / "alone" / "run")
    if {"array", "multirun"} & set(steps):
        references = {pruner: FOLDER / "single" / pruner / "run" for pruner in PRUNERS}
        for pruner in references:
            shell(*ivtp(f"pruner={pruner}", f"output={FOLDER}/single/{pruner}"))
        if "array" in steps:
            array(references)
        if "multirun" in steps:
            multirun(references)
    print("all is as without Slurm")


if __name__ == "__main__":
    main()
