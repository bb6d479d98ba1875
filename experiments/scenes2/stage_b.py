"""Stage B: projector and language model, from answers. The vision tower is frozen, its features are computed once.

Many questions per scene go through one forward: each sees the image and itself only. The model sees all image tokens;
`--drop` keeps a random share at the language model's input, as an ablation. Attention is not supervised. For the first
quarter a decaying loss lets a projected patch score the first piece of its object's name through the head.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from experiments.scenes2 import cache, models, stage_a
from experiments.scenes2.cache import MOST, NAMES
from experiments.tiny_vlm import loop
from ivtp.data.scenes2.questions import FAMILIES

DROP, ODDS = (1.0, 1 / 3, 1 / 9), (0.45, 0.25, 0.3)


def load_joint(path: Path, patches: int) -> models.Joint:
    """Stage A's networks from a checkpoint."""
    joint, _ = stage_a.build(patches)
    joint.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model"])
    return joint


@torch.no_grad()
def compute_features(rank: int, workers: int, folder: Path, paths: list[Path], patches: int) -> None:
    """Penultimate features (1000, n, width) of shards, bfloat16 as int16, beside them; each worker takes its share."""
    joint = load_joint(folder / "stage_a_done.pt", patches).eval().to(loop.device())
    for path in paths[rank::workers]:
        if (path / "features.npy").exists():
            continue
        images = cache.Shard(path).images
        part = path / "features.part.npy"
        out = np.lib.format.open_memmap(part, "w+", np.int16, (len(images), patches, models.WIDTH))
        for start in range(0, len(images), 50):
            some = torch.from_numpy(np.array(images[start : start + 50])).to(loop.device())
            states, _ = models.fast_vision(joint.vision, models.normalise(some))
            out[start : start + 50] = states[:, 1:].to(models.LOW).view(torch.int16).cpu().numpy()
        out.flush()
        part.rename(path / "features.npy")


class Encoder:
    """Questions and answers as left-padded ids."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos, self.pad = tokenizer, tokenizer.eos_token_id, tokenizer.pad_token_id
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Pieces of a text that follows an image or a question."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def __call__(self, groups: list[list]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids (b, q, t), which of them are real, and targets (b, q, read): the answer's pieces and EOS at the places
        that predict them, -100 elsewhere. The last answer piece is the last token."""
        asked = [[(self.ids(q[1]), self.ids(q[2])) for q in group] for group in groups]
        read = 1 + max(len(a) for group in asked for _, a in group)
        longest = max(len(q) + len(a) for group in asked for q, a in group)
        longest = -(-longest // 4) * 4
        ids = np.full((len(groups), len(groups[0]), longest), self.pad, np.int64)
        targets = np.full((*ids.shape[:2], read), -100, np.int64)
        for i, group in enumerate(asked):
            for j, (question, answer) in enumerate(group):
                text = [*question, *answer]
                ids[i, j, longest - len(text) :] = text
                targets[i, j, read - len(answer) - 1 :] = [*answer, self.eos]
        ids = torch.from_numpy(ids).to(loop.device())
        return ids, ids != self.pad, torch.from_numpy(targets).to(loop.device())


def forward(
    llava, seen: torch.Tensor | None, kept: torch.Tensor | None, ids, valid, read: int, early: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Logits (b, q, read, vocabulary), those after layer `early`, and the projected image tokens.

    Without `seen` the model reads the questions alone: the blind baseline.
    """
    language, projector = llava.model.language_model, llava.model.multi_modal_projector
    table = language.embed_tokens
    bos = table.weight[llava.config.text_config.bos_token_id].expand(len(ids), 1, -1)
    if seen is None:
        image, prefix, positions, start = None, bos, torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device), 1
    else:
        position = torch.arange(seen.shape[1], device=seen.device).expand(len(seen), -1)
        start = seen.shape[1] + 1
        if kept is not None:
            seen, position = seen.gather(1, kept[..., None].expand(-1, -1, models.WIDTH)), kept
        image = models.linear(F.gelu(models.linear(seen, projector.linear_1)), projector.linear_2).float()
        prefix = torch.cat((bos, image), 1)
        positions = torch.cat((torch.zeros_like(position[:, :1]), position + 1), 1)
    states, middle = models.fast_llama(language, prefix, positions, table(ids), valid, start, read, early)
    return llava.lm_head(states), None if middle is None else llava.lm_head(middle), image


def hits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether greedy decoding gives the answer and then EOS: every piece is likeliest given the right ones before."""
    return ((logits.argmax(-1) == targets) | (targets < 0)).all(-1)


def tokens_kept(
    count: int, wanted: np.ndarray | None, rng: np.random.Generator, patches: int, scenes: int
) -> np.ndarray:
    """Indices (scenes, count) of the tokens that stay: those of `wanted` (scenes, patches) first, then chance."""
    order = rng.random((scenes, patches))
    if wanted is not None:
        order = order - wanted
    return np.sort(np.argsort(order, 1)[:, :count], 1)


@torch.no_grad()
def evaluate(llava, shard: cache.Shard, encoder: Encoder, scenes: int, mode: str = "all", extra: bool = False) -> dict:
    """Accuracy per family on a held-out shard.

    Args:
        llava: projector and language model.
        shard: with features.
        encoder: of texts.
        scenes: how many.
        mode: `all` tokens; `random` or `oracle` 1/9 of them (one question at a time for the oracle); `blind`: no image;
            `shuffled`: the image of another scene.
        extra: also accuracy after part 1 (first piece), and by size and salience of the targets.
    """
    patches = (shard.images.shape[1] // models.PATCH) ** 2
    scenes, right = min(scenes, len(shard)), {}
    rng = np.random.default_rng(1)

    def add(name: str, value: float) -> None:
        right.setdefault(name, []).append(value)

    features = np.load(shard.path / "features.npy", mmap_mode="r") if mode != "blind" else None
    for start in range(0, scenes, 20):
        index = np.arange(start, min(start + 20, scenes))
        groups = [shard.questions[i] for i in index]
        seen = kept = None
        if mode != "blind":
            rows = (index + scenes // 2) % scenes if mode == "shuffled" else index
            seen = torch.from_numpy(np.array(features[rows])).view(torch.bfloat16).to(loop.device())
        if mode == "oracle":  # the tokens depend on the question
            shown = shard.patches(index)
            wanted = np.stack([shown[i][q[4]].any(0) for i, group in enumerate(groups) for q in group])
            kept = tokens_kept(round(patches / 9), wanted, rng, patches, len(wanted))
            seen = seen.repeat_interleave(len(groups[0]), 0)
            groups = [[q] for group in groups for q in group]
        elif mode == "random":
            kept = tokens_kept(round(patches / 9), None, rng, patches, len(index))
        if kept is not None:
            kept = torch.from_numpy(kept).to(loop.device())
        ids, valid, targets = encoder(groups)
        logits, middle, _ = forward(llava, seen, kept, ids, valid, targets.shape[-1], models.PART_1 if extra else 0)
        hit = hits(logits, targets)
        first = (targets >= 0).int().argmax(-1, keepdim=True)
        for i, group in enumerate(groups):
            for j, question in enumerate(group):
                family, value = question[0], hit[i, j].item()
                add(family, value)
                if extra:
                    place = first[i, j, 0]
                    add("early", (middle[i, j, place].argmax() == targets[i, j, place]).item())
                    for name in question[5:7]:
                        if name:
                            add(f"{'size' if name in cache.TIERS else 'salience'}_{name}", value)
                    if family == "exist":
                        add(f"negatives_{question[7]}", value)
    result = {name: sum(values) / len(values) for name, values in right.items()}
    return result | {"average": sum(result[family] for family in FAMILIES) / len(FAMILIES)}


def alignment(llava, image: torch.Tensor, shard: cache.Shard, index: np.ndarray, first: torch.Tensor) -> torch.Tensor:
    """A projected patch of an object should score the first piece of its name, through the final norm and the head."""
    shown, things = torch.from_numpy(shard.patches(index)), torch.from_numpy(shard.things[index].astype(np.int64))
    scene, thing, patch = shown[:, :MOST].nonzero(as_tuple=True)
    states = models.rms(llava.model.language_model.norm, image[scene.to(image.device), patch.to(image.device)])
    return F.cross_entropy(llava.lm_head(states), first[things[scene, thing, 0]].to(image.device))


def new_model(patches: int, seed: int):
    """Projector and language model at their start, and the tokenizer."""
    torch.manual_seed(seed)
    tokenizer, _ = models.tokenizers()
    llava = models.new_llava(tokenizer, patches)
    models.start_like_identity(llava.model.language_model)
    return llava, tokenizer


def train(rank: int, workers: int, folder: Path, options, blind: bool = False) -> None:
    """One worker of stage B; resumes from `stage_b.pt`, ends with `stage_b_done.pt`. `blind`: the same without images."""
    name, steps = ("blind", options.blind_steps) if blind else ("stage_b", options.steps_b)
    llava, tokenizer = new_model(options.size, options.seed)
    llava.model.vision_tower.requires_grad_(False)
    llava.model.multi_modal_projector.requires_grad_(not blind)
    llava.to(loop.device())
    side = models.SIDES[options.size]
    (held_out,) = (cache.Shard(path) for path in cache.wait(folder, "validation", options.seed, side)[:1])
    ready = cache.ready(folder, "train", options.seed, side)
    paths = ready if blind else [path for path in ready if (path / "features.npy").exists()]
    shards = [cache.Shard(path) for path in paths]
    features = [] if blind else [np.load(path / "features.npy", mmap_mode="r") for path in paths]
    optimizers = loop.Optimizers(llava, lambda n: ".layers." in n, options.rate_b, steps)
    log, checkpoint, first = loop.Log(folder / f"{name}.jsonl", rank), folder / f"{name}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=loop.device())
        llava.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        first = state["step"]
    rng, shared = np.random.default_rng((options.seed, rank, first, 2)), np.random.default_rng((options.seed, first, 3))
    encoder = Encoder(tokenizer)
    pieces = torch.tensor([encoder.ids(concept)[0] for concept in NAMES])
    size, align_until = options.batch_b // workers, steps // 4
    sums: dict[str, float] = {}
    for step in range(first, steps):
        which = rng.integers(len(shards))
        shard = shards[which]
        index = np.sort(rng.choice(len(shard), size, replace=False))
        groups = [shard.questions[i] for i in index]
        ids, valid, targets = encoder(groups)
        seen = kept = None
        if not blind:
            seen = torch.from_numpy(np.array(features[which][index])).view(torch.bfloat16).to(loop.device())
            share = DROP[shared.choice(len(DROP), p=ODDS)] if options.drop else 1.0
            if share < 1:
                count = round(share * options.size)
                kept = torch.from_numpy(tokens_kept(count, None, rng, options.size, size)).to(loop.device())
        logits, _, image = forward(llava, seen, kept, ids, valid, targets.shape[-1])
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=-100)
        total = loss
        if step < align_until and not blind and kept is None:
            total = loss + 0.5 * (1 - step / align_until) * alignment(llava, image, shard, index, pieces)
        total.backward()
        for p in optimizers.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = optimizers.step(step)
        sums["loss"] = sums.get("loss", 0.0) + loss.item()
        hit = hits(logits.detach(), targets).float().mean(0)
        families = [q[0] for q in groups[0]]
        for family in FAMILIES:
            mine = [h for h, f in zip(hit.tolist(), families, strict=True) if f == family]
            sums[family] = sums.get(family, 0.0) + sum(mine) / len(mine)
        last = step + 1 == steps
        if (step + 1) % options.log_every == 0:
            log(step=step + 1, norm=norm, **{key: value / options.log_every for key, value in sums.items()})
            sums = {}
        if (step + 1) % options.save_every == 0 or last:
            if rank == 0:
                content = {"model": llava.state_dict(), "optimizers": optimizers.state_dict(), "step": step + 1}
                loop.save(checkpoint, content)
            if dist.is_initialized():
                dist.barrier()
        if rank == 0 and ((step + 1) % options.check_every == 0 or last):
            for mode in ("blind",) if blind else ("all", "random", "oracle", "shuffled"):
                figures = evaluate(llava, held_out, encoder, options.check_scenes, mode, extra=mode == "all")
                log(step=step + 1, held_out=mode, **figures)
        if last and dist.is_initialized():
            dist.barrier()
    if rank == 0:
        loop.save(folder / f"{name}_done.pt", {"model": llava.state_dict()})
