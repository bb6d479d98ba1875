"""The model card: `python -m experiments.scenes2.card RUN [MODEL]` measures a model folder and writes its README.md.

Test, style and wild scenes are made and encoded in RUN, as training's are. Run it once the weights are frozen.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from string import Template

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection, LlavaForConditionalGeneration, LlavaProcessor

from experiments.scenes2 import cache, models, stage_a, stage_b
from ivtp.backbones.loading.hub import EMBEDDED
from ivtp.data.scenes2 import FAMILIES, Scenes2, data_hash
from ivtp.evaluation.statistics import mean_error

MODES = {"all": "all tokens", "random": "random 1/9", "oracle": "asked object first, 1/9", "shuffled": "another image"}
SCENES = {"test": 1000, "style": 500, "wild": 500}
WORDS, LOOKED = 500, 300  # scenes
HERE = Path(__file__).parent


class Frozen:
    """A model folder under the names that the recipe uses; `seconds` of transformers' own pass are measured on it, too."""

    def __init__(self, folder: Path):
        self.llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = LlavaProcessor.from_pretrained(folder)
        self.patches = self.llava.config.image_seq_length
        self.joint, self.clip_tokenizer = stage_a.build(self.patches)
        self.joint.vision = self.llava.model.vision_tower
        self.joint.text = CLIPTextModelWithProjection.from_pretrained(folder / "clip", dtype=torch.float32).eval()
        projection = load_file(folder / "clip" / "model.safetensors")["visual_projection.weight"]
        self.joint.visual_projection.weight.data.copy_(projection)
        self.encoder = stage_b.Encoder(self.processor.tokenizer)


def shard_of(run: Path, split: str, frozen: Frozen) -> cache.Shard:
    """Scenes of a split with their features, made where they are not there yet."""
    side, count = models.SIDES[frozen.patches], SCENES[split]
    path = cache.root(run, split, 0, side) / "0000"
    if not path.exists():
        cache.make_shard(path.parent, split, 0, 0, side, count)
    shard = cache.Shard(path)
    stage_b.encode(frozen.joint.vision, shard)
    return shard


def accuracies(frozen: Frozen, shard: cache.Shard, mode: str) -> dict[str, tuple[float, float, int]]:
    """Mean, standard error (scenes as clusters) and n of every group, and of the average over all questions."""
    groups: dict[str, list[tuple[bool, str]]] = {}
    asked = (frozen.llava, shard, frozen.encoder, len(shard), mode, mode == "all")
    for scene, group, value in stage_b.answers(*asked):
        names = (group, "average") if group in FAMILIES else (group,)
        for name in names:
            groups.setdefault(name, []).append((value, str(scene)))
    return {name: (*mean_error(*zip(*pairs, strict=True)), len(pairs)) for name, pairs in groups.items()}


@torch.no_grad()
def plain(frozen: Frozen, scenes: int = 25) -> tuple[float, float]:
    """Share of questions that transformers' own `generate` gets right on the first test scenes, and seconds per 1000."""
    data, right = Scenes2("test", scenes, 0, models.SIDES[frozen.patches]), 0
    start = time.perf_counter()
    for first in range(0, len(data), 8):
        items = [data[i] for i in range(first, first + 8)]
        texts = [f"<image> {item['question']}" for item in items]
        batch = frozen.processor(
            text=texts, images=[item["image"] for item in items], return_tensors="pt", padding=True, padding_side="left"
        )
        said = frozen.llava.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
        told = frozen.processor.batch_decode(said, skip_special_tokens=True)
        right += sum(text.strip() == item["answer"] for text, item in zip(told, items, strict=True))
    return right / len(data), (time.perf_counter() - start) / len(data) * 1000


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def percent(value: tuple[float, float, int]) -> str:
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def write(run: Path, folder: Path) -> None:
    """Measure, and write `README.md` and `card.json` into the model folder."""
    blind = [json.loads(line) for line in (run / "blind.jsonl").read_text().splitlines()]
    frozen = Frozen(folder)
    record, rows, hard = {}, [], []
    for split in SCENES:
        shard = shard_of(run, split, frozen)
        for mode, title in MODES.items():
            found = record[f"{split} {mode}"] = accuracies(frozen, shard, mode)
            rows.append([split, title, *(percent(found[name]) for name in (*FAMILIES, "average"))])
            print(rows[-1], flush=True)
        found = record[f"{split} all"]
        hard.append([split, *(percent(found[name]) for name in sorted(found) if ": " in name), percent(found["early"])])
    shard = shard_of(run, "test", frozen)
    record["blind"] = next(line for line in reversed(blind) if line.get("held_out") == "blind")
    tau = record["tau"] = stage_a.evaluate(frozen.joint, shard, frozen.clip_tokenizer, WORDS)
    shown = shard.patches(np.arange(LOOKED)).any(1)
    record["cls"] = stage_a.attention_statistics(frozen.joint.vision, shard.images[:LOOKED], shown)
    *looks, area = record["cls"].rsplit(" area ", 1)
    looks = [layer.split("/") for layer in looks[0].split()]
    sizes = [
        q[4] and shard.patches(np.array([i]))[0, q[4]].any(0).mean() for i in range(LOOKED) for q in shard.questions[i]
    ]
    record["target"] = float(np.median([size for size in sizes if size]))
    record["plain"] = plain(frozen)
    record["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    average = {mode: record[f"test {mode}"]["average"][0] for mode in MODES}
    heads = [*sorted(name for name in record["test all"] if ": " in name), "early"]
    fields = {
        "parameters": f"{sum(p.numel() for p in frozen.llava.parameters()) / 1e6:.1f}",
        "patches": frozen.patches,
        "side": models.SIDES[frozen.patches],
        "accuracy": table(["split", "tokens", *FAMILIES, "all questions"], rows),
        "hard": table(["split", *heads], hard),
        "random": f"{100 * average['random'] / average['all']:.1f}",
        "oracle": f"{100 * average['oracle'] / average['all']:.1f}",
        "blind": ", ".join(f"{name} {100 * record['blind'][name]:.1f}" for name in (*FAMILIES, "average")),
        "cls": table(
            ["layer", *(str(i + 1) for i in range(len(looks)))],
            [
                [name, *column]
                for name, column in zip(("self", "patches", "objects"), zip(*looks, strict=True), strict=True)
            ],
        ),
        "area": f"{100 * float(area):.0f}",
        "target": f"{100 * record['target']:.1f}",
        **{name: f"{100 * tau[name]:.1f}" for name in ("tau_true", "tau_true_salient", "tau_false", "tau_function")},
        "plain": f"{100 * record['plain'][0]:.1f}",
        "seconds": f"{record['plain'][1]:.0f}",
        "hashes": table(["split", "scenes", "SHA-256"], [[s, "200", data_hash(s, 200)] for s in ("train", *SCENES)]),
        **record["versions"],
    }
    text = Template((HERE / "card.md").read_text(encoding="utf-8")).substitute(fields)
    (folder / "README.md").write_text(text, encoding="utf-8")
    (HERE / "card.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("model", type=Path, nargs="?", default=EMBEDDED["tiny"])
    given = parser.parse_args()
    write(given.run, given.model)
