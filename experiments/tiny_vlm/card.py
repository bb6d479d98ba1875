"""The model card: measures the exported folder and writes its README.md. `python experiments/tiny_vlm/card.py`."""

import argparse
import collections
import json
import platform
import sys
import time
from pathlib import Path
from string import Template

import numpy as np
import torch
import torch.nn.functional as F

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextModelWithProjection, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from experiments.tiny_vlm import export, models, stage_a, stage_b
from experiments.tiny_vlm.words import CONTENT
from ivtp.data.scenes import FAMILIES, NUMBERS, PLURALS, Scenes, data_hash

KEEP = 16
CUTS = {3: 83, 6: 48, 9: 28, 12: KEEP}  # patches left after a layer of the tower, equal ratios

LOOKS = {"self": "{:.2f}", "patches": "{:.0f}", "objects": "{:.2f}"}


def _vision(vision, pixels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Penultimate features with patches dropped at random inside the tower, between attention and feed-forward."""
    model = models.tower(vision)
    x = model.pre_layrnorm(model.embeddings(pixels))
    where = torch.arange(models.PATCHES).expand(len(x), -1)
    for i, layer in enumerate(model.encoder.layers[:-1]):
        h = layer.layer_norm1(x)
        q, k, v = (
            linear(h).view(len(x), -1, models.HEADS, models.WIDTH // models.HEADS).transpose(1, 2)
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + layer.self_attn.out_proj(mixed)
        if i + 1 in CUTS:
            picked = torch.rand(where.shape, generator=generator).argsort(1)[:, : CUTS[i + 1]].sort(1).values
            where = where.gather(1, picked)
            x = torch.cat((x[:, :1], x[:, 1:].gather(1, picked[..., None].expand(-1, -1, models.WIDTH))), 1)
        x = x + layer.mlp(layer.layer_norm2(x))
    return x[:, 1:], where


@torch.no_grad()
def accuracy(model, processor, split: str, scenes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Whether the answers are right, (scenes, families): unpruned; with `KEEP` random patches at the language model's
    input; and with patches dropped at random inside the tower. A picture's five questions share its forward pass."""
    data, generator = Scenes(split, scenes, seed), torch.Generator().manual_seed(1)
    questions = stage_b.Questions(processor.tokenizer)
    right: dict[str, list[torch.Tensor]] = {"unpruned": [], "input": [], "tower": []}
    for start in range(0, scenes, 20):
        index = range(start, min(start + 20, scenes))
        images = torch.from_numpy(np.stack([data.scene(i)[0].image for i in index]))
        ids, valid, targets = questions.encode([data.scene(i)[1] for i in index], False)
        patches = models.normalise(images)
        whole = models.fast_vision(model.model.vision_tower, patches)["penultimate"][:, 1:]
        where = torch.rand(whole.shape[:2], generator=generator).argsort(1)[:, :KEEP].sort(1).values
        pixels = patches.view(-1, 12, 12, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, models.SIZE, models.SIZE)
        inside, left = _vision(model.model.vision_tower, pixels, generator)
        spread = torch.zeros_like(whole).scatter(1, left[..., None].expand_as(inside), inside)
        for how, features, kept in (("unpruned", whole, None), ("input", whole, where), ("tower", spread, left)):
            logits, _ = stage_b.forward(model, features, kept, ids, valid)
            right[how].append(logits[:, :, 0].argmax(-1) == targets[:, :, 0])
    return {how: torch.cat(rows).numpy() for how, rows in right.items()}


@torch.no_grad()
def plain(model, processor, split: str, scenes: int, seed: int = 0) -> tuple[np.ndarray, float]:
    """The same, unpruned, by the processor and transformers' own forward pass, and CPU seconds per 1000 questions."""
    data, right, spent = Scenes(split, scenes, seed), [], 0.0
    for start in range(0, len(data), 25):
        items = [data[i] for i in range(start, min(start + 25, len(data)))]
        begin = time.process_time()
        texts = [export.PROMPT.format(question=item["question"]) for item in items]
        batch = processor(text=texts, images=[item["image"] for item in items], return_tensors="pt", padding=True)
        said = model(**batch, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        spent += time.process_time() - begin
        words = processor.tokenizer.convert_ids_to_tokens(said)
        right += [word == item["answer"] for word, item in zip(words, items, strict=True)]
    return np.array(right).reshape(scenes, -1), spent / len(data) * 1000


@torch.no_grad()
def words_against_tau(model, folder: Path, split: str, scenes: int, seed: int = 0) -> dict[str, float]:
    """Which words of the questions pass the threshold: those true of the picture, those not, function words."""
    text = CLIPTextModelWithProjection.from_pretrained(folder / "clip").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    projection = load_file(folder / "clip" / "model.safetensors")["visual_projection.weight"]
    data, counts = Scenes(split, scenes, seed), collections.defaultdict(list)
    for i in range(scenes):
        scene, questions = data.scene(i)
        pixels = models.normalise(torch.from_numpy(scene.image)[None])
        cls = models.fast_vision(model.model.vision_tower, pixels)["cls"]
        cls = F.normalize(cls @ projection.T, dim=-1)
        true = {w for t in scene.objects for w in (t.color, t.kind)}
        true |= {NUMBERS[t.digit] for t in scene.objects if t.digit >= 0}
        true |= {PLURALS[w] for w in true if w in PLURALS}
        batch = tokenizer(
            [*(q.text for q in questions), "a number " + " ".join(NUMBERS)], padding=True, return_tensors="pt"
        )
        states = F.normalize(text.text_projection(text(**batch).last_hidden_state), dim=-1) @ cls[0]
        for row, ids in enumerate(batch["input_ids"]):
            passed = False
            for token, cosine in zip(tokenizer.convert_ids_to_tokens(ids.tolist()), states[row].tolist(), strict=True):
                if token.startswith("<"):
                    continue
                passes = cosine >= stage_a.TAU
                if row == len(questions):
                    if token in NUMBERS:
                        counts["digit words, present" if token in true else "digit words, absent"].append(passes)
                    continue
                passed |= passes
                group = ("present" if token in true else "absent") if token in CONTENT else "function"
                counts[group].append(passes)
            if row < len(questions):
                counts["questions with at least one word"].append(passed)
    return {name: float(np.mean(values)) for name, values in counts.items()}


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _cells(right: np.ndarray) -> list[str]:
    n = len(right)
    cells = [f"{100 * p:.1f} ± {100 * (p * (1 - p) / n) ** 0.5:.1f}" for p in right.mean(0)]
    average = right.mean(1)
    return [*cells, f"{100 * average.mean():.1f} ± {100 * average.std(ddof=1) / n**0.5:.1f}"]


def write(folder: Path = export.TARGET, scenes: int = 2000, seed: int = 0) -> None:
    """Measure on validation and test, fill in card.md as the folder's README.md, and keep the numbers in card.json."""
    transformers_logging.set_verbosity_error()
    models.LOW = torch.float32
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    record: dict = {}
    rows = []
    titles = {
        "unpruned": "unpruned",
        "input": f"random, {KEEP} of 144 at the language model's input",
        "tower": "random, " + " → ".join(map(str, (144, *CUTS.values()))) + " inside the tower",
    }
    for split in ("validation", "test"):
        outcomes = accuracy(model, processor, split, scenes, seed)
        for how, right in outcomes.items():
            rows.append([split, titles[how], *_cells(right)])
            by_family = dict(zip(FAMILIES, right.mean(0).tolist(), strict=True))
            record[f"{split} {how}"] = {**by_family, "average": right.mean().item()}
            print(rows[-1], flush=True)
    some = min(100, scenes)
    again, seconds = plain(model, processor, "test", some, seed)
    if (again != outcomes["unpruned"][:some]).mean() > 0.01:
        raise SystemExit("transformers' own forward pass answers otherwise than the training's")
    record["transformers"] = {"scenes": some, "average": again.mean().item(), "seconds_per_1000": seconds}
    data = Scenes("test", scenes, seed)
    counts = {family: collections.Counter() for family in FAMILIES}
    for i in range(scenes):
        for question in data.scene(i)[1]:
            counts[question.family][question.answer] += 1
    chance = [f"{100 * max(c.values()) / scenes:.1f} ({c.most_common(1)[0][0]})" for c in counts.values()]
    hashes = [
        [split, str(n), data_hash(split, n, seed)]
        for split, n in (("train", 1000), ("validation", scenes), ("test", scenes))
    ]
    pictures = np.stack([data.scene(i)[0].image for i in range(500)])
    masks = np.stack([np.any([t.patches for t in data.scene(i)[0].objects], axis=0) for i in range(500)])
    attention = stage_a.attention_statistics(model.model.vision_tower, pictures, masks)
    tau = words_against_tau(model, folder, "test", 500, seed)
    record |= {"attention": attention, "tau": tau}
    kept = {
        (split, how): record[f"{split} {how}"]["average"] / record[f"{split} unpruned"]["average"]
        for split in ("validation", "test")
        for how in ("input", "tower")
    }
    record["retention"] = {" ".join(key): value for key, value in kept.items()}
    layers = [str(i + 1) for i in range(len(attention))]
    looks = [[name, *(form.format(row[name]) for row in attention)] for name, form in LOOKS.items()]
    fields = {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        "prompt": export.PROMPT,
        "scenes": scenes,
        "some": some,
        "accuracy": _table(["split", "tokens", *FAMILIES, "average"], rows),
        "chance": ", ".join(f"{family} {share}" for family, share in zip(FAMILIES, chance, strict=True)),
        "seconds": f"{seconds:.1f}",
        "area": f"{100 * attention[0]['area']:.0f}",
        "attention": _table(["layer", *layers], looks),
        "tau": _table(["words", "share"], [[name, f"{100 * value:.1f} %"] for name, value in sorted(tau.items())]),
        "hashes": _table(["split", "scenes", "SHA-256"], hashes),
        "seed": seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{f"{how}_{split}": f"{100 * share:.1f}" for (split, how), share in kept.items()},
    }
    here = Path(__file__)
    (folder / "README.md").write_text(Template(here.with_name("card.md").read_text()).substitute(fields))
    here.with_name("card.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=export.TARGET)
    parser.add_argument("--scenes", type=int, default=2000)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.scenes)
