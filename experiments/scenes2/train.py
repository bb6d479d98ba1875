"""Train the model for scenes2: `python -m experiments.scenes2.train`. Continues where it was stopped; see README.md."""

import argparse
import socket
import subprocess
import sys
from pathlib import Path

import torch

from experiments.scenes2 import cache, export, loop, models, stage_a, stage_b


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/scenes2"), help="data, checkpoints and logs")
    parser.add_argument("--size", type=int, choices=tuple(models.SIDES), default=324, help="patches of an image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes; one where there is a GPU")
    parser.add_argument("--shards", type=int, default=40, help="of training scenes")
    parser.add_argument("--fillers", type=int, default=1, help="processes that draw the scenes")
    parser.add_argument("--shard-scenes", type=int, default=cache.SHARD, help="scenes of a shard")
    parser.add_argument("--steps-a", type=int, default=4000)
    parser.add_argument("--batch-a", type=int, default=32, help="scenes")
    parser.add_argument("--rate-a", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="stage A begins with the weights of this `stage_a_done.pt`")
    parser.add_argument("--dense", type=float, default=0.8, help="initial weight of the dense label")
    parser.add_argument("--steps-b", type=int, default=1400)
    parser.add_argument("--batch-b", type=int, default=16, help="scenes, of 20 questions each")
    parser.add_argument("--rate-b", type=float, default=2e-3)
    parser.add_argument("--start-b", type=Path, help="stage B goes on from this `stage_b_done.pt`")
    parser.add_argument("--blind-steps", type=int, default=300, help="of the blind baseline")
    parser.add_argument("--drop", action="store_true", help="ablation: drop patches at random in training")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--check-every", type=int, default=200)
    parser.add_argument("--check-scenes", type=int, default=300, help="validation scenes, of 8 questions each")
    parser.add_argument("--feature-shards", type=int, default=20, help="training shards of stage B")
    parser.add_argument("--target", type=Path, help="where the model is written; by default FOLDER/model")
    parser.add_argument(
        "--until", choices=("a", "features", "b", "blind", "export"), default="export", help="last thing to do"
    )
    return parser.parse_args(arguments)


def fill(o: argparse.Namespace) -> list[subprocess.Popen]:
    """Start the processes that draw the scenes; training begins with the first shard."""
    side, running = str(models.SIDES[o.size]), []
    for split, shards, fillers in (("validation", 1, 1), ("train", o.shards, o.fillers)):
        if len(cache.ready(o.folder, split, o.seed, int(side))) >= shards:
            continue
        for first in range(fillers):
            command = [sys.executable, "-m", "experiments.scenes2.cache", "--folder", o.folder, "--split", split]
            command += ["--seed", o.seed, "--side", side, "--shards", shards, "--scenes", o.shard_scenes]
            command += ["--first", first, "--every", fillers]
            running.append(subprocess.Popen([str(word) for word in command]))
    return running


def free_port() -> int:
    """A port for the workers, so that two runs on a machine do not meet."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def main() -> None:
    o = options()
    o.target = o.target or o.folder / "model"
    if torch.cuda.is_available():
        o.workers = 1
    o.folder.mkdir(parents=True, exist_ok=True)
    fillers = fill(o)
    try:
        if not (o.folder / "stage_a_done.pt").exists():
            loop.launch(stage_a.train, o.folder, o, workers=o.workers, port=free_port())
        if o.until == "a":
            return
        side = models.SIDES[o.size]
        paths = cache.wait(o.folder, "train", o.seed, side, min(o.feature_shards, o.shards))[: o.feature_shards]
        paths += cache.wait(o.folder, "validation", o.seed, side)[:1]
    finally:
        for filler in fillers:
            filler.terminate()
    loop.launch(stage_b.compute_features, o.folder, paths, o.size, workers=o.workers, port=free_port())
    if o.until == "features":
        return
    if not (o.folder / "stage_b_done.pt").exists():
        loop.launch(stage_b.train, o.folder, o, workers=o.workers, port=free_port())
    if o.until == "b":
        return
    if not (o.folder / "blind_done.pt").exists():
        loop.launch(stage_b.train, o.folder, o, True, workers=o.workers, port=free_port())
    if o.until == "blind":
        return
    export.write(o.folder, o.target, o.size)


if __name__ == "__main__":
    main()
