"""All that needs a GPU, in one run of at most eight minutes: `make gpu`, or parts of it.

    python tests/gpu/run.py [device=cuda] [output=build/gpu] [parts=machine,float32,bfloat16,float16,embedded,speed]

    machine             versions, and whether the package imports from this checkout
    float32, bfloat16,  the oracles over every pruner and family in a number type (tests/helpers/place.py has the tolerances)
    float16
    embedded            the embedded model: answers as on a CPU, workers, compiled prefills, too little memory
    speed               `ivtp.bench suite=gpu`

Every part has a time limit of its own, and those that take no times run side by side. A result is appended to gpu.jsonl as
soon as it is there, also of a part that is cut off; logs lie beside it. `device=cpu` is the rehearsal, with smaller sizes.
Ends with status 1 if a part failed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).parents[2]
ORACLES = ("core/test_scores.py", "pruners/test_every_pruner.py", "backbones/test_families.py")
CONVERSATIONS = ("turns_go_on_as_if", "assisted_generation_decodes", "an_offloaded_cache_decodes")
"""Parts of the names of the tests of `generate` that belong to oracle 4; they compare tokens, so in float32 only."""
STAGES = ({"machine": 40}, {"float32": 230, "bfloat16": 230, "float16": 230, "embedded": 180}, {"speed": 210})
"""Parts that run side by side, with their limits in seconds."""
SHARES = {"float32": 0.3, "bfloat16": 0.3, "float16": 0.3}
"""Part of the cores for each number type."""


def run(command: list[str], log: Path, seconds: float, **variables: str) -> tuple[int | None, str]:
    """Status of a command, None if it ran out of time, and what it printed; the log grows while it runs."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | variables
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, 9)
            process.wait()
    return status, log.read_text(errors="replace")


def machine(device: str, output: Path, seconds: float) -> dict:
    """Versions and the device, and a public import from the checkout."""
    code = (
        "import json, sys, ivtp\nfor name in ivtp.__all__: getattr(ivtp, name)\nfrom importlib.util import find_spec\n"
        "from ivtp.timing.measure import machine\nimport torch\n"
        "packages = {n: find_spec(n) is not None for n in ('flash_attn', 'kernels', 'kvpress', 'bitsandbytes')}\n"
        f"found = machine({device!r}) | {{'from': ivtp.__file__, 'packages': packages}}\n"
        f"if {device!r} == 'cuda': found['memory'] = torch.cuda.mem_get_info()[1]\n"
        "print(json.dumps(found))"
    )
    status, text = run([sys.executable, "-c", code], output / "machine.log", seconds)
    if status != 0:
        return {"ended": status is not None, "failed": ["import"]}
    return json.loads(text.strip().splitlines()[-1])


def oracles(dtype: str, device: str, output: Path, seconds: float) -> dict:
    """Numbers of passed, failed and skipped tests, and the names of those that failed."""
    processes = str(max(1, round(SHARES[dtype] * (os.cpu_count() or 1))))
    files = [f"tests/{name}" for name in ORACLES]
    if dtype == "float32":
        names = (ROOT / "tests" / "backbones" / "test_generate.py").read_text()
        found = re.findall(rf"def (test_(?:{'|'.join(CONVERSATIONS)})\w*)", names)
        files += [f"tests/backbones/test_generate.py::{name}" for name in found]
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", "-n", processes, *files]
    status, text = run(
        command, output / f"{dtype}.log", seconds, IVTP_TEST_DEVICE=device, IVTP_TEST_DTYPE=dtype, OMP_NUM_THREADS="1"
    )
    found = re.findall(r"(PASSED|FAILED|SKIPPED|ERROR) (tests/\S+)", text)
    counts = {word.lower(): sum(w == word for w, _ in set(found)) for word in ("PASSED", "SKIPPED", "FAILED", "ERROR")}
    failed = sorted({name for word, name in found if word in ("FAILED", "ERROR")})
    return counts | {
        "ended": status is not None,
        "failed_tests": failed[:40],
        "failed": ["cut off"] * (status is None) + (failed[:1] or ["pytest"] * bool(status)),
    }


def speed(device: str, output: Path, seconds: float) -> dict:
    """The record of the suite, or of as much of it as there was time for."""
    partial = output / "speed.partial.json"
    partial.unlink(missing_ok=True)
    suite = "gpu" if device == "cuda" else "tiny"
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom ivtp.timing.suites import run\n"
        "say = lambda line: print(line, flush=True)\n"
        f"save = lambda record: Path({str(partial)!r}).write_text(json.dumps(record))\n"
        f"save(run({suite!r}, say=say, save=save))"
    )
    status, _ = run([sys.executable, "-c", code], output / "speed.log", seconds)
    record = json.loads(partial.read_text()) if partial.exists() else {}
    return {"ended": status == 0, "failed": ["suite"] * (status != 0), "record": record}


COMMAND = "import sys; from ivtp.cli.run import main; sys.exit(main(sys.argv[1:]))"
SMALL_MEMORY = "import torch; torch.cuda.set_per_process_memory_fraction((400 << 20) / torch.cuda.mem_get_info()[1]); "
ROWS = (
    "variants=[{label: unpruned, pruner: none}, {label: ivtp, pruner: ivtp}, {label: fastv, pruner: fastv}, "
    "{label: tome, pruner: tome}]"
)
TWO = "variants=[{label: unpruned, pruner: none}, {label: ivtp, pruner: ivtp}]"
ONE = "variants=[{label: ivtp, pruner: ivtp}]"


def embedded(device: str, output: Path, seconds: float) -> dict:
    """Answers of the embedded model on the device beside those on a CPU, under several settings of the run."""
    end = time.monotonic() + seconds
    scenes = "data.scenes=10" if device == "cuda" else "data.scenes=2"
    where = "cuda:0" if device == "cuda" else "cpu"
    runs = {
        "cpu": [ROWS, "trainer.device=cpu", "trainer.threads=4"],
        "device": [ROWS, f"trainer.device={where}", "trainer.workers=4"],
        "small memory": [TWO, f"trainer.device={where}", "trainer.batch_size=80"],
        "compile default": [ONE, "data.limit=16", f"trainer.device={where}", "trainer.compile=default"],
        "compile reduce-overhead": [ONE, "data.limit=16", f"trainer.device={where}", "trainer.compile=reduce-overhead"],
    }
    found: dict = {"failed": []}
    answers: dict = {}
    for name, settings in runs.items():
        if device == "cpu" and name == "compile reduce-overhead":
            continue  # CUDA graphs
        start, folder = time.monotonic(), output / "embedded" / name.replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        code = SMALL_MEMORY * (name == "small memory" and device == "cuda") + COMMAND
        command = [
            sys.executable,
            "-c",
            code,
            f"name={folder.name}",
            scenes,
            f"output={folder.parent}",
            "logger=none",
            "viewer=0",
        ]
        status, text = run(
            [*command, "costs.models=[]", *settings], output / f"{folder.name}.log", end - time.monotonic()
        )
        if status != 0:
            found[name] = {"status": status, "said": text.strip().splitlines()[-1:]}
            found["failed"].append(name)
            continue
        answers[name] = read(folder)
        found[name] = {"seconds": time.monotonic() - start, "accuracy": accuracy(answers[name])}
        found[name]["smaller batches"] = re.findall(r"going on with trainer.batch_size=(\d+)", text)
        if "cpu" in answers and name != "cpu":
            found[name] |= agreement(answers[name], answers["cpu"])
            if found[name]["equal answers"] < 0.99:
                found["failed"].append(name)
    return found


def read(folder: Path) -> dict:
    """Outcomes by row and sample."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {
        row["label"]: {
            outcome["id"]: outcome
            for outcome in map(json.loads, (folder / "outcomes" / f"{row['key']}.jsonl").read_text().splitlines())
        }
        for row in rows
        if "label" in row
    }


def accuracy(answers: dict) -> dict:
    """Share of correct answers per row."""
    return {label: sum(o["correct"] for o in rows.values()) / len(rows) for label, rows in answers.items()}


def agreement(answers: dict, expected: dict) -> dict:
    """Shares of equal answers and of equal sets of kept tokens, over the rows that both have."""
    pairs = [(rows[name], expected[label][name]) for label, rows in answers.items() for name in rows]
    return {
        "answers": len(pairs),
        "equal answers": sum(a["prediction"] == b["prediction"] for a, b in pairs) / len(pairs),
        "equal kept tokens": sum(a["kept"] == b["kept"] for a, b in pairs) / len(pairs),
    }


def main(arguments: list[str]) -> int:
    """Run the parts; return the exit status."""
    given = dict(argument.split("=", 1) for argument in arguments)
    device, output = given.get("device", "cuda"), Path(given.get("output", ROOT / "build" / "gpu"))
    output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[str, Path, float], dict]] = {"machine": machine, "embedded": embedded, "speed": speed}
    parts |= {dtype: partial(oracles, dtype) for dtype in SHARES}
    chosen = given.get("parts", ",".join(parts)).split(",")
    failed: list[str] = []
    lock = Lock()

    def part(name: str, limit: float) -> None:
        start = time.monotonic()
        result = parts[name](device, output, limit if device == "cuda" else 3000)
        line = {"part": name, "device": device, "seconds": round(time.monotonic() - start, 1)} | result
        with lock, (output / "gpu.jsonl").open("a") as out:
            failed.extend(f"{name}: {what}" for what in line.pop("failed", []))
            out.write(json.dumps(line) + "\n")
            print(json.dumps({key: value for key, value in line.items() if key != "record"}), flush=True)

    for stage in STAGES:
        with ThreadPoolExecutor() as pool:
            running = [pool.submit(part, name, limit) for name, limit in stage.items() if name in chosen]
        for done in running:
            done.result()
    print("failed: " + "; ".join(failed) if failed else "passed", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
