"""Train the embedded model: `python experiments/tiny_vlm/train.py`. Continues where it was stopped; see README.md."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.tiny_vlm import cache, card, export, loop, stage_a, stage_b


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/tiny_vlm"), help="data, checkpoints and logs")
    parser.add_argument("--target", type=Path, default=export.TARGET, help="where the model is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes; one where there is a GPU")
    parser.add_argument("--train-scenes", type=int, default=64000)
    parser.add_argument("--held-out-scenes", type=int, default=2000)
    parser.add_argument("--feature-scenes", type=int, default=40000, help="training scenes of stage B")
    parser.add_argument("--steps-a", type=int, default=3000)
    parser.add_argument("--batch-a", type=int, default=64, help="scenes")
    parser.add_argument("--rate-a", type=float, default=2e-3)
    parser.add_argument("--steps-b", type=int, default=1200)
    parser.add_argument("--batch-b", type=int, default=32, help="scenes, of 20 questions each")
    parser.add_argument("--rate-b", type=float, default=2e-3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile stage B")
    parser.add_argument("--card-scenes", type=int, default=2000, help="of validation and of test, for the card")
    parser.add_argument("--until", choices=("a", "features", "b", "card"), default="card", help="last thing to do")
    return parser.parse_args()


def main() -> None:
    o = options()
    if torch.cuda.is_available():
        o.workers = 1
    o.folder.mkdir(parents=True, exist_ok=True)
    for split, scenes in (("train", o.train_scenes), ("validation", o.held_out_scenes)):
        cache.load(o.folder / "data", split, scenes, o.seed)
    done_a, done_b = o.folder / "stage_a_done.pt", o.folder / "stage_b_done.pt"
    if not done_a.exists():
        loop.launch(stage_a.train, o.folder, o, workers=o.workers)
    if o.until == "a":
        return
    if not (o.folder / "features_done").exists():
        jobs = [("train", o.feature_scenes, o.train_scenes, o.seed), ("validation", *[o.held_out_scenes] * 2, o.seed)]
        stage_b.make_features(o.folder, jobs)
        loop.launch(stage_b.compute_features, o.folder, done_a, jobs, workers=o.workers)
        (o.folder / "features_done").touch()
    if o.until == "features":
        return
    if not done_b.exists():
        loop.launch(stage_b.train, o.folder, o, workers=o.workers)
    if o.until == "b":
        return
    joint = export.load_joint(done_a)
    llava = stage_b.load_model(done_b, o.seed)
    export.assemble(joint, llava)
    export.write(joint, llava, o.target)
    card.write(o.target, o.card_scenes, o.seed)


if __name__ == "__main__":
    main()
