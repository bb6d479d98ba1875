"""Two processes against one, a thread each, on the same rows of the embedded model.

    python -m experiments.scale.processes [rounds=3] [scenes=100]

Times the rows alone (from the first batch on disk to the last result) and the whole command, alternating. Writes
processes.json beside this file. Needs two free cores.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROWS = "variants=[{label: unpruned, pruner: none}, {label: ivtp}, {label: random, pruner: random}]"


def run(ranks: int, scenes: int) -> dict:
    """Seconds of the rows and of the command, and the outcomes."""
    with TemporaryDirectory() as folder:
        given = [
            ROWS,
            f"data.scenes={scenes}",
            f"trainer.devices={ranks}",
            "trainer.threads=1",
            "trainer.batch_size=10",
        ]
        given += ["logger=none", "viewer=2", "costs.models=[]", f"output={folder}"]
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "ivtp.run", *given],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        results, first, last = Path(folder, "run", "results.jsonl"), None, 0.0
        while process.poll() is None:
            if first is None and list(Path(folder, "run").glob("outcomes/*.rank*.jsonl")):
                first = time.monotonic()
            if not last and results.is_file() and results.read_bytes().count(b"\n") == 3:
                last = time.monotonic()
            time.sleep(0.01)
        assert process.returncode == 0 and first is not None
        files = sorted(Path(folder, "run", "outcomes").iterdir())
        return {
            "rows_s": last - first,
            "command_s": time.monotonic() - begun,
            "outcomes": [path.read_bytes() for path in files],
        }


def main(arguments: list[str]) -> None:
    given = {"rounds": "3", "scenes": "100"} | dict(argument.split("=", 1) for argument in arguments)
    measured = [[run(ranks, int(given["scenes"])) for ranks in (1, 2)] for _ in range(int(given["rounds"]))]
    equal = all(one["outcomes"] == measured[0][0]["outcomes"] for pair in measured for one in pair)
    report = {
        "command": f"python -m experiments.scale.processes {' '.join(arguments)}".strip(),
        "outcomes_equal": equal,
    }
    for what in ("rows", "command"):
        pairs = [[round(one[f"{what}_s"], 2) for one in pair] for pair in measured]
        report[what] = {"seconds": pairs, "speed_up": round(statistics.median(a / b for a, b in pairs), 3)}
    Path(__file__).with_name("processes.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
