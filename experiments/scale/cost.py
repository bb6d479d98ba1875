"""GPU hours of the twelve benchmarks on 1, 8 and 64 GPUs, from FLOPs in closed form.

    python -m experiments.scale.cost [model=llava_1_5_7b] [text=60] [rows=91]

Prefill FLOPs over a sustained rate; the answers of most benchmarks are one word. What does not shrink with the number of
GPUs: the start of a run (SECONDS_START), the part of a row that rank 0 does alone (SECONDS_ROW), and the last batches of a
row, for which most ranks wait.
"""

import sys
from math import ceil

from ivtp.experiment.config import load_config, variants
from ivtp.experiment.costs import closed_form
from ivtp.experiment.planning import build_shape

SAMPLES = {
    "vqav2": 214_354,
    "gqa": 12_578,
    "vizwiz": 4_319,
    "scienceqa_img": 2_017,
    "textvqa": 5_000,
    "pope": 9_000,
    "mme": 2_374,
    "mmbench": 4_329,
    "mmbench_cn": 4_329,
    "seedbench": 17_990,
    "llava_in_the_wild": 60,
    "mmvet": 218,
}
"""Samples of the splits that the options of the group `data` name."""
TFLOPS = 125.0
"""Sustained rate of a GPU: 40 % of the 312 TFLOP/s of an A100 in bfloat16."""
BATCH = 16
SECONDS_START, SECONDS_ROW = 90.0, 3.0
GPUS = (1, 8, 64)


def hours(samples: int, tflops: list[float], gpus: int) -> float:
    """Wall time of a run with a row for each of these costs per sample."""
    batches = ceil(samples / BATCH)
    rows = [ceil(batches / gpus) * BATCH * spent / TFLOPS + SECONDS_ROW for spent in tflops]
    return (SECONDS_START + sum(rows)) / 3600


def main(arguments: list[str]) -> None:
    given = {"model": "llava_1_5_7b", "text": "60", "rows": "91"} | dict(word.split("=", 1) for word in arguments)
    config = load_config([f"model={given['model']}", "pruner=ivtp"])
    text = int(given["text"])
    unpruned, pruned = (
        r["tflops"]["total"] for r in closed_form("", list(variants(config)), build_shape(config), [text], None)
    )
    tflops = [unpruned] + [pruned] * (int(given["rows"]) - 1)
    print(f"{given['model']}, {text} text tokens: {unpruned:.2f} TFLOPs, with IVTP {pruned:.2f}; {len(tflops)} rows")
    print("| benchmark | samples |" + "".join(f" {gpus} GPU{'s' * (gpus > 1)}, h | kept busy |" for gpus in GPUS))
    print("|---|--:|" + "--:|--:|" * len(GPUS))
    total = dict.fromkeys(GPUS, 0.0)
    work = sum(SAMPLES.values()) * sum(tflops) / TFLOPS / 3600
    for name, samples in [*SAMPLES.items(), ("all twelve", 0)]:
        cells = ""
        for gpus in GPUS:
            wall = hours(samples, tflops, gpus) if samples else total[gpus]
            busy = (samples * sum(tflops) / TFLOPS / 3600 if samples else work) / (wall * gpus)
            total[gpus] += wall if samples else 0
            cells += f" {wall:.1f} | {busy:.0%} |"
        print(f"| {name} | {samples or sum(SAMPLES.values())} |{cells}")


if __name__ == "__main__":
    main(sys.argv[1:])
