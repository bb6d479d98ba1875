"""Runs that are killed at random moments, with any number of ranks and workers, end as one that was left alone.

    python -m experiments.scale.kills [kills=10] [ranks=1,2,3] [workers=0,2] [seed=0]

Every start of a run is stopped after a random time: SIGKILL to the command, SIGKILL to a random rank, SIGTERM or SIGINT to
the command. After the last kill the run goes on to its end, and outcomes (byte for byte), metrics, comparisons and table are
compared with a run of one process without a kill. Writes kills.json beside this file.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

ROWS = "variants=[{label: unpruned, pruner: none}, {label: ivtp}, {label: random, pruner: random}]"
KEYS = (
    ROWS,
    "data.scenes=40",
    "trainer.batch_size=4",
    "trainer.threads=1",
    "viewer=2",
    "logger=none",
    "costs.models=[]",
)


def start(output: Path, ranks: int, workers: int) -> subprocess.Popen:
    given = [*KEYS, f"output={output}", f"trainer.devices={ranks}", f"trainer.workers={workers}"]
    with open(output / "log.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ivtp.run", *given],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def finish(output: Path, ranks: int, workers: int) -> float:
    begun = time.monotonic()
    status = start(output, ranks, workers).wait()
    assert status == 0, f"status {status}: {(output / 'log.txt').read_text()[-3000:]}"
    return time.monotonic() - begun


def contents(folder: Path) -> tuple:
    """Outcomes, metrics, comparisons and table; its last column is the throughput."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return (
        {path.name: path.read_bytes() for path in (folder / "outcomes").iterdir() if path.suffix == ".jsonl"},
        [(record["label"], record["metrics"]) for record in records],
        (folder / "comparisons.json").read_bytes(),
        [line.rsplit("|", 2)[0] for line in (folder / "table.md").read_text().splitlines()],
    )


def outcomes(folder: Path) -> int:
    """Outcomes on disk."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("outcomes/*.jsonl"))


def kill(process: subprocess.Popen, output: Path, draw: random.Random) -> str:
    """Stop a run in a random way; return which."""
    ranks = [json.loads(path.read_text())["pid"] for path in output.glob("run/.lock*.json") if path.stat().st_size]
    kind = draw.choice(("SIGKILL", "SIGTERM", "SIGINT", "SIGKILL of a rank"))
    if kind == "SIGKILL of a rank" and ranks:
        os.kill(draw.choice(ranks), signal.SIGKILL)
    else:
        kind = kind.removesuffix(" of a rank")
        process.send_signal(getattr(signal, kind))
    process.wait(timeout=120)
    return f"{kind}, status {process.returncode}"


def trial(reference: tuple, seconds: float, ranks: int, workers: int, kills: int, draw: random.Random) -> dict:
    """Kill a run so many times, let it end, and compare."""
    with TemporaryDirectory() as folder:
        output, moments = Path(folder), []
        while len(moments) < kills:
            process, wait = start(output, ranks, workers), draw.uniform(0, seconds)
            try:
                process.wait(timeout=wait)
            except subprocess.TimeoutExpired:
                how = kill(process, output, draw)
                moments.append({"after_s": round(wait, 2), "how": how, "outcomes": outcomes(output / "run")})
                continue
            # It was done before: the rest of the kills meets it from its start.
            assert process.returncode == 0, (output / "log.txt").read_text()[-3000:]
            for path in (output / "run").rglob("*.jsonl"):
                path.unlink()
        finish(output, ranks, workers)
        equal = contents(output / "run") == reference
        if not equal:
            shutil.copytree(folder, Path(gettempdir(), f"ivtp-kills-{ranks}-{workers}"), dirs_exist_ok=True)
    return {"ranks": ranks, "workers": workers, "equal": equal, "kills": moments}


def main(arguments: list[str]) -> None:
    given = {"kills": "10", "ranks": "1,2,3", "workers": "0,2", "seed": "0"}
    given |= dict(argument.split("=", 1) for argument in arguments)
    ranks, workers = (map(int, given[name].split(",")) for name in ("ranks", "workers"))
    draw = random.Random(int(given["seed"]))
    with TemporaryDirectory() as folder:
        seconds = finish(Path(folder), 1, 0)
        reference = contents(Path(folder) / "run")
    print(f"alone: {seconds:.0f} s", flush=True)
    trials = []
    for number, others in product(ranks, workers):
        trials.append(trial(reference, 1.2 * seconds, number, others, int(given["kills"]), draw))
        print(f"{number} rank(s), {others} worker(s): {'equal' if trials[-1]['equal'] else 'DIFFERENT'}", flush=True)
    about = {
        "command": f"python -m experiments.scale.kills {' '.join(arguments)}".strip(),
        "alone_s": round(seconds, 1),
    }
    text = json.dumps(about | {"all_equal": all(trial["equal"] for trial in trials), "trials": trials}, indent=1)
    Path(__file__).with_name("kills.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
