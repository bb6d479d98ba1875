"""Stage A: vision tower and text encoder, from dense patch labels and image-text contrast.

Losses, each a plain mean:
- dense: type, colour and place of the object on every surviving patch, at the penultimate and at a middle layer;
- captions: sigmoid contrast (SigLIP) of the class token with captions that list all objects, and with captions in
  which one word was changed, so that the class token has to know every object;
- words: sigmoid contrast of the class token with each word of captions and questions, in its context. Positive where
  the word is true of the picture. The logit is `scale * (cosine - 0.2)`: the word is true beyond 0.2, the threshold of
  instruction-guided pruning in the paper. Function words are always negative.

Attention is not supervised. Patches are dropped at random, with one ratio per batch.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.tiny_vlm import cache, loop, models, words
from ivtp.data.scenes import COLORS, KINDS, NUMBERS, PLURALS, SHAPES, make_questions

TYPES = 1 + len(SHAPES) + len(NUMBERS)
TINTS = 1 + len(COLORS)
TAU = 0.2
MIDDLE, SPREAD = 6.0, 3.0  # of the places that are regressed
KEEP = (1.0, 0.5, 0.33)
_COLORS = list(COLORS)


def _object_words(thing: np.ndarray) -> list[str]:
    kind, color, digit = (int(v) for v in thing[:3])
    return [_COLORS[color], KINDS[kind], *([NUMBERS[digit]] if digit >= 0 else [])]


def captions(things: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """A caption that lists all objects in random order, and the same with one word changed."""
    listed = [_object_words(t) for t in rng.permutation(things[things[:, 0] >= 0])]
    wrong = [list(w) for w in listed]
    i = rng.integers(len(wrong))
    spots = [j for j in range(len(wrong[i])) if wrong[i][j] != "number"]
    j = spots[rng.integers(len(spots))]
    pool = _COLORS if j == 0 else (list(SHAPES) if j == 1 else list(NUMBERS))
    wrong[i][j] = [w for w in pool if w != wrong[i][j]][rng.integers(len(pool) - 1)]
    return tuple(" and ".join("a " + " ".join(w) for w in group) for group in (listed, wrong))


def truth(things: np.ndarray) -> set[str]:
    """The content words that are true of a scene."""
    said = {w for t in things[things[:, 0] >= 0] for w in _object_words(t)}
    return said | {PLURALS[w] for w in said if w in PLURALS}


class Batches:
    """Endless batches of a worker, from its own stream of random numbers."""

    def __init__(self, arrays: dict[str, np.ndarray], tokenizer, size: int, seed: tuple[int, ...], questions: int = 24):
        self.arrays, self.tokenizer, self.size, self.questions = arrays, tokenizer, size, questions
        self.rng = np.random.default_rng(seed)
        self.ids = tokenizer.get_vocab()
        self.vocabulary = {i: w for w, i in self.ids.items()}
        self.content = np.array([self.vocabulary[i] in words.CONTENT for i in range(len(tokenizer))])

    def __call__(self, index: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        rng = self.rng
        if index is None:
            index = np.sort(rng.choice(len(self.arrays["images"]), self.size, replace=False))
        things, patches = self.arrays["things"][index], self.arrays["patches"][index]
        kind, color, place = cache.patch_labels(things, patches)
        true, false = zip(*(captions(t, rng) for t in things), strict=True)
        asked = []
        for i in rng.choice(index, self.questions):
            asked += [rng.choice(make_questions(cache.restore(self.arrays, i), rng)).text]
        tokens = self.tokenizer([*true, *false, *asked], padding=True, return_tensors="pt")
        table = np.zeros((len(index), len(self.vocabulary)), bool)
        for row, thing in enumerate(things):
            table[row, [self.ids[w] for w in truth(thing)]] = True
        batch = {
            "images": torch.from_numpy(np.ascontiguousarray(self.arrays["images"][index])),
            "kind": torch.from_numpy(kind),
            "color": torch.from_numpy(color),
            "place": torch.from_numpy(place),
            "ids": tokens["input_ids"],
            "mask": tokens["attention_mask"],
            "true": torch.from_numpy(table),
        }
        return {name: value.to(loop.device()) for name, value in batch.items()}


def text_features(text: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised features of whole texts (n, joint) and of each of their tokens (n, t, joint)."""
    out = text(input_ids=ids, attention_mask=mask)
    return F.normalize(out.text_embeds, dim=-1), F.normalize(text.text_projection(out.last_hidden_state), dim=-1)


def losses(
    model: models.Joint, batch: dict, kept: torch.Tensor | None, content: torch.Tensor, digits: torch.Tensor
) -> dict[str, torch.Tensor]:
    """All parts of the loss; `content` says which token ids are content words, `digits` lists those of the digits."""
    out = models.fast_vision(model.vision, models.normalise(batch["images"]), kept, model.middle)
    n = len(batch["images"])

    def pick(t: torch.Tensor) -> torch.Tensor:
        if kept is None:
            return t
        return t.gather(1, kept if t.ndim == 2 else kept[..., None].expand(-1, -1, t.shape[-1]))

    kind, color, place = pick(batch["kind"]), pick(batch["color"]), pick(batch["place"])
    own = torch.arange(models.PATCHES, device=kind.device)
    own = pick((torch.stack((own // 12, own % 12), -1).float().expand(n, -1, -1) - MIDDLE) / SPREAD)
    place = (place - MIDDLE) / SPREAD
    weight = 1 + 1.5 * (kind > len(SHAPES)).float()  # digits are the hard ones
    result = {}
    for name, head, share in (("penultimate", model.heads[0], 1.0), ("middle", model.heads[1], 0.5)):
        logits = head(out[name][:, 1:])
        by_type, by_color, geometry = logits.split((TYPES, TINTS, 5), -1)
        cross = F.cross_entropy(by_type.flatten(0, 1), kind.flatten(), reduction="none")
        result[f"type_{name}"] = share * (cross * weight.flatten()).mean()
        result[f"color_{name}"] = share * F.cross_entropy(by_color.flatten(0, 1), color.flatten())
        there = (kind > 0).float()[..., None]
        far = F.smooth_l1_loss(geometry[..., :3], place, reduction="none") * there
        result[f"place_{name}"] = share * (
            far.sum() / there.sum().clamp(min=1) / 3 + F.mse_loss(geometry[..., 3:], own)
        )
    image = F.normalize(model.visual_projection(out["cls"]), dim=-1)
    whole, tokens = text_features(model.text, batch["ids"], batch["mask"])
    logits = model.caption_scale.exp() * image @ whole[: 2 * n].T + model.caption_bias
    sign = 2 * torch.eye(n, 2 * n, device=image.device) - 1
    loss = -F.logsigmoid(sign * logits)
    own_pair, wrong_pair = loss.diagonal(), loss[:, n:].diagonal()
    result["caption"] = own_pair.mean() + wrong_pair.mean() + loss.mean()
    valid = batch["mask"].bool() & (batch["ids"] > 3)
    ids = batch["ids"][valid]
    logits = model.word_scale.exp() * (image @ tokens[valid].T - TAU)
    true = batch["true"][:, ids]
    loss = F.softplus(torch.where(true, -logits, logits))
    share = torch.where(content[ids], 1.0, 0.25) + 4.0 * torch.isin(ids, digits)  # digits come last
    result["words"] = 3 * (loss * share).sum() / (share.sum() * n)
    return result


def draw_kept(share: float, size: int, generator: torch.Generator) -> torch.Tensor | None:
    """Indices (size, n) of a random share of the patches."""
    if share == 1:
        return None
    order = torch.rand(size, models.PATCHES, generator=generator).argsort(1)
    return order[:, : round(share * models.PATCHES)].sort(1).values.to(loop.device())


@torch.no_grad()
def evaluate(model: models.Joint, arrays: dict, tokenizer, scenes: int = 512) -> dict[str, float]:
    """Held-out figures: patch and object accuracy, caption pairs, words against tau."""
    batches = Batches(arrays, tokenizer, 64, (7,))
    sums: dict[str, list[float]] = {}
    content = torch.from_numpy(batches.content).to(loop.device())

    def add(name: str, value: torch.Tensor) -> None:
        entry = sums.setdefault(name, [0.0, 0.0])
        entry[0] += value.float().sum().item()
        entry[1] += value.numel()

    model.eval()
    scenes = min(scenes, len(arrays["images"]))
    for start in range(0, scenes, 64):
        index = np.arange(start, min(start + 64, scenes))
        batch = batches(index)
        n = len(index)
        out = models.fast_vision(model.vision, models.normalise(batch["images"]), None, model.middle)
        by_type, by_color, geometry = model.heads[0](out["penultimate"][:, 1:]).split((TYPES, TINTS, 5), -1)
        kind, color = batch["kind"], batch["color"]
        add("patch_type", by_type.argmax(-1) == kind)
        there = kind > 0
        add("patch_color", (by_color.argmax(-1) == color)[there])
        add("place_error", (geometry[..., :2] * SPREAD + MIDDLE - batch["place"][..., :2]).abs()[there])
        things, patches = (
            arrays["things"][index],
            torch.from_numpy(np.array(arrays["patches"][index])).to(loop.device()),
        )
        scores = (patches.float() @ by_type.log_softmax(-1))[..., 1:].argmax(-1) + 1
        for row in range(n):
            for i, thing in enumerate(things[row]):
                if thing[0] >= 0:
                    label = 1 + len(SHAPES) + thing[2] if thing[2] >= 0 else 1 + thing[0]
                    add("digit" if thing[2] >= 0 else "shape", scores[row, i] == int(label))
        image = F.normalize(model.visual_projection(out["cls"]), dim=-1)
        whole, tokens = text_features(model.text, batch["ids"], batch["mask"])
        own, wrong = (image @ whole[:n].T).diagonal(), (image @ whole[n : 2 * n].T).diagonal()
        add("caption_beats_changed", own > wrong)
        add("caption_first", (image @ whole[:n].T).argmax(1) == torch.arange(n, device=image.device))
        valid = batch["mask"].bool() & (batch["ids"] > 3)
        ids = batch["ids"][valid]
        passes = image @ tokens[valid].T >= TAU
        true = batch["true"][:, ids]
        digits = torch.tensor([batches.vocabulary[i] in NUMBERS for i in ids.tolist()], device=ids.device)
        add("tau_present", passes[true])
        add("tau_absent", passes[~true & content[ids]])
        add("tau_function", passes[:, ~content[ids]])
        add("tau_present_digits", passes[true & digits])
        add("tau_absent_digits", passes[~true & digits])
    model.train()
    return {name: total / max(count, 1) for name, (total, count) in sums.items()}


@torch.no_grad()
def attention_statistics(vision: nn.Module, images: np.ndarray, masks: np.ndarray) -> list[dict[str, float]]:
    """What the class token looks at, per layer (heads averaged).

    Args:
        vision: the tower.
        images: uint8 (n, 96, 96, 3).
        masks: (n, 144), patches that hold objects.

    Returns:
        Per layer: `self` (attention of CLS on itself), `patches` (effective number, exp of the entropy over patches),
        `objects` (share of the attention on patches that goes to objects) and `area` (their share of the patches).
    """
    model = models.tower(vision)
    x = models.normalise(torch.from_numpy(np.array(images)).to(model.post_layernorm.weight.device))
    x = F.linear(x, model.embeddings.patch_embedding.weight.flatten(1))
    cls = model.embeddings.class_embedding.expand(len(x), 1, -1)
    x = model.pre_layrnorm(torch.cat((cls, x), 1) + model.embeddings.position_embedding.weight)
    objects = torch.from_numpy(np.array(masks)).float().to(x.device)
    rows = []
    for layer in model.encoder.layers:
        h = layer.layer_norm1(x)
        q, k = (
            proj(h).view(len(x), -1, models.HEADS, models.WIDTH // models.HEADS).transpose(1, 2)
            for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        attention = (q[:, :, :1] @ k.transpose(-1, -2) * (models.WIDTH // models.HEADS) ** -0.5).softmax(-1)[:, :, 0]
        attention = attention.mean(1)
        over = attention[:, 1:] / attention[:, 1:].sum(1, keepdim=True)
        rows.append(
            {
                "self": attention[:, 0].mean().item(),
                "patches": (-(over * over.clamp(min=1e-12).log()).sum(1)).exp().mean().item(),
                "objects": (over * objects).sum(1).mean().item(),
                "area": objects.mean().item(),
            }
        )
        x = models._clip_layer(layer, x)
    return rows


def statistics_line(rows: list[dict[str, float]]) -> str:
    """Per layer: own share / effective patches / objects' share."""
    return (
        " ".join(f"{r['self']:.2f}/{r['patches']:.0f}/{r['objects']:.2f}" for r in rows)
        + f" area {rows[0]['area']:.2f}"
    )


def build() -> tuple[models.Joint, object]:
    tokenizer = words.clip_tokenizer()
    return models.Joint(tokenizer, TYPES, TINTS), tokenizer


def train(rank: int, workers: int, folder: Path, options) -> None:
    """One worker of stage A; resumes from `stage_a.pt`, ends with `stage_a_done.pt`."""
    torch.manual_seed(options.seed)
    model, tokenizer = build()
    model.to(loop.device())
    arrays = cache.load(folder / "data", "train", options.train_scenes, options.seed)
    held_out = cache.load(folder / "data", "validation", options.held_out_scenes, options.seed)
    optimizers = loop.Optimizers(model, lambda name: ".layers." in name, options.rate_a, options.steps_a)
    log = loop.Log(folder / "stage_a.jsonl", rank)
    checkpoint = folder / "stage_a.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=loop.device())
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        first = state["step"]
    batches = Batches(arrays, tokenizer, options.batch_a // workers, (options.seed, rank, first))
    content = torch.from_numpy(batches.content).to(loop.device())
    digits = torch.tensor([batches.ids[name] for name in NUMBERS], device=loop.device())
    shared = np.random.default_rng((options.seed, first))  # the same ratio in all workers, which wait for each other
    generator = torch.Generator().manual_seed(options.seed + 1000 * first + rank)
    sums: dict[str, float] = {}
    for step in range(first, options.steps_a):
        kept = draw_kept(KEEP[shared.choice(len(KEEP), p=(0.3, 0.4, 0.3))], batches.size, generator)
        parts = losses(model, batches(), kept, content, digits)
        sum(parts.values()).backward()
        norm = optimizers.step(step)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if (step + 1) % 100 == 0:
            log(step=step + 1, norm=norm, **{name: value / 100 for name, value in sums.items()})
            sums = {}
        if rank == 0 and ((step + 1) % 500 == 0 or step + 1 == options.steps_a):
            figures = evaluate(model, held_out, tokenizer)
            some = held_out["images"][:64], held_out["patches"][:64].any(1)
            log(step=step + 1, held_out=True, **figures, cls=statistics_line(attention_statistics(model.vision, *some)))
            loop.save(
                checkpoint, {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "step": step + 1}
            )
    if rank == 0:
        loop.save(folder / "stage_a_done.pt", {"model": model.state_dict()})
