"""Stage B: projector and language model, from answers. The vision tower is frozen, its features are computed once.

Many questions per scene go through one forward: each sees the image and itself only. Patches are dropped at random at
the input of the language model, those that stay keep their positions. Attention is not supervised.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from experiments.tiny_vlm import cache, export, loop, models, words
from ivtp.data.scenes import COLORS, FAMILIES, KINDS, NUMBERS, SPLITS, make_questions

KEEP, ODDS = (1.0, 1 / 3, 1 / 9), (0.45, 0.25, 0.3)
LONGEST = 11  # words of a question
MIX = {"exist": 3, "attribute": 3, "digit": 2, "count": 6, "spatial": 6}  # questions per scene
_COLORS = list(COLORS)


def _feature_file(folder: Path, split: str, scenes: int) -> Path:
    return folder / "data" / f"features-{split}-{scenes}"


def _features(folder: Path, split: str, scenes: int, mode: str) -> np.ndarray:
    """bfloat16 (scenes, 144, width), which numpy sees as int16."""
    shape = (scenes, models.PATCHES, models.WIDTH)
    return np.asarray(np.memmap(_feature_file(folder, split, scenes), np.int16, mode, shape=shape))


def make_features(folder: Path, jobs: list[tuple[str, int, int, int]]) -> None:
    """Empty files for `compute_features`."""
    for split, scenes, _, _ in jobs:
        _features(folder, split, scenes, "w+")


@torch.no_grad()
def compute_features(
    rank: int, workers: int, folder: Path, joint_path: Path, jobs: list[tuple[str, int, int, int]]
) -> None:
    """Penultimate features of scenes; each worker fills its share.

    Args:
        rank, workers: of this process.
        folder: of the run.
        joint_path: checkpoint of stage A.
        jobs: split, how many of its scenes, how many scenes its cache holds, and seed.
    """
    joint = export.load_joint(joint_path).eval().to(loop.device())
    for split, scenes, of, seed in jobs:
        arrays = cache.load(folder / "data", split, of, seed)
        out = _features(folder, split, scenes, "r+")
        for start in range(rank * 64, scenes, workers * 64):
            images = torch.from_numpy(np.array(arrays["images"][start : min(start + 64, scenes)])).to(loop.device())
            result = models.fast_vision(joint.vision, models.normalise(images))["penultimate"][:, 1:]
            out[start : start + len(images)] = result.to(models.LOW).view(torch.int16).cpu().numpy()


class Questions:
    """Tokenised questions about scenes."""

    def __init__(self, tokenizer, device: torch.device | str = "cpu"):
        self.device = device
        self.ids = tokenizer.get_vocab()
        self.eos = tokenizer.eos_token_id

    def encode(self, groups: list[list], answers: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left-padded ids (b, q, t), which of them are real, and targets (b, q, 1 or 2) of the last tokens."""
        texts = [[q.text.split() + [q.answer] * answers for q in group] for group in groups]
        longest = LONGEST + answers  # always the same shapes, for torch.compile
        ids = np.zeros((len(groups), len(groups[0]), longest), np.int64)
        targets = np.full((*ids.shape[:2], 1 + answers), self.eos)
        for i, group in enumerate(texts):
            for j, text in enumerate(group):
                ids[i, j, longest - len(text) :] = [self.ids[word] for word in text]
                targets[i, j, 0] = self.ids[groups[i][j].answer]
        ids = torch.from_numpy(ids).to(self.device)
        return ids, ids != 0, torch.from_numpy(targets).to(self.device)


def forward(
    llava, seen: torch.Tensor, kept: torch.Tensor | None, ids: torch.Tensor, valid: torch.Tensor, read: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (b, q, read, vocabulary), and the image tokens that went in."""
    model, projector = llava.model, llava.model.multi_modal_projector
    position = torch.arange(models.PATCHES, device=seen.device).expand(len(seen), -1)
    if kept is not None:
        seen = seen.gather(1, kept[..., None].expand(-1, -1, models.WIDTH))
        position = kept
    h = F.gelu(models._linear(seen, projector.linear_1))
    image = models._linear(h, projector.linear_2).float()
    table = model.language_model.embed_tokens
    bos = table.weight[llava.config.text_config.bos_token_id].expand(len(seen), 1, -1)
    prefix = torch.cat((bos, image), 1)
    positions = torch.cat((torch.zeros_like(position[:, :1]), position + 1), 1)
    state = models.fast_llama(model.language_model, prefix, positions, table(ids), valid, read=read)
    return llava.lm_head(state), image


def alignment(llava, image: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A patch of an object should score the words of the object, through the final norm and the head.

    Args:
        image: projected patches (b, n, width).
        targets: (b, n, vocabulary), a distribution over the words; zeros on the background.
    """
    scores = llava.lm_head(models._rms(llava.model.language_model.norm, image)).log_softmax(-1)
    return -(scores * targets).sum(-1).sum() / targets.sum().clamp(min=1)


def patch_words(things: np.ndarray, patches: np.ndarray, ids: dict[str, int]) -> torch.Tensor:
    """For `alignment`: per patch, equal shares for colour, kind and number."""
    said = np.zeros((*things.shape[:2], len(ids)), np.float32)
    for i, j in zip(*np.nonzero(things[..., 0] >= 0), strict=True):
        kind, color, digit = (int(v) for v in things[i, j, :3])
        names = [_COLORS[color], KINDS[kind], *([NUMBERS[digit]] if digit >= 0 else [])]
        said[i, j, [ids[name] for name in names]] = 1 / len(names)
    return torch.einsum("btp,btv->bpv", torch.from_numpy(patches.astype(np.float32)), torch.from_numpy(said))


@torch.no_grad()
def evaluate(
    llava, feats: np.ndarray, arrays: dict, questions: Questions, scenes: int, keep: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Accuracy per family with the questions of `Scenes("validation")`; `keep` patches of 144, at random."""
    right = dict.fromkeys(FAMILIES, 0)
    generator = torch.Generator().manual_seed(1)
    for start in range(0, scenes, 100):
        index = range(start, min(start + 100, scenes))
        groups = [
            make_questions(cache.restore(arrays, i), np.random.default_rng((seed, SPLITS.index("validation"), i, 1)))
            for i in index
        ]
        ids, valid, targets = questions.encode(groups, False)
        kept = None
        if keep is not None:
            kept = (
                torch.rand(len(groups), models.PATCHES, generator=generator)
                .argsort(1)[:, :keep]
                .sort(1)
                .values.to(loop.device())
            )
        seen = torch.from_numpy(np.array(feats[start : start + len(groups)])).view(torch.bfloat16).to(loop.device())
        logits, _ = forward(llava, seen, kept, ids, valid)
        hit = (logits[:, :, 0].argmax(-1) == targets[:, :, 0]).sum(0)
        for family, count in zip(FAMILIES, hit, strict=True):
            right[family] += count.item()
    result = {family: count / scenes for family, count in right.items()}
    return {**result, "average": sum(result.values()) / len(result)}


def draw(arrays: dict, index: np.ndarray, rng: np.random.Generator) -> list[list]:
    """Questions about some scenes, in the proportions of `MIX`."""
    groups = []
    most = max(MIX.values())
    for i in index:
        asked = make_questions(cache.restore(arrays, i), rng, most)
        by_family = {family: asked[f * most : (f + 1) * most] for f, family in enumerate(FAMILIES)}
        groups.append([q for family, count in MIX.items() for q in by_family[family][:count]])
    return groups


def new_model(seed: int):
    """Projector and language model at their start, and the tokenizer."""
    torch.manual_seed(seed)
    tokenizer = words.language_tokenizer()
    llava = models.new_llava(tokenizer)
    models.start_like_identity(llava.model.language_model)
    return llava, tokenizer


def load_model(path: Path, seed: int = 0):
    """The trained projector and language model; their vision tower is not the trained one, see `export.assemble`."""
    llava, _ = new_model(seed)
    llava.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model"])
    return llava


def train(rank: int, workers: int, folder: Path, options) -> None:
    """One worker of stage B; resumes from `stage_b.pt`, ends with `stage_b_done.pt`."""
    llava, tokenizer = new_model(options.seed)
    llava.model.vision_tower.requires_grad_(False)
    llava.to(loop.device())
    arrays = cache.load(folder / "data", "train", options.train_scenes, options.seed)
    held_out = cache.load(folder / "data", "validation", options.held_out_scenes, options.seed)
    feats = _features(folder, "train", options.feature_scenes, "r")
    held_out_feats = _features(folder, "validation", options.held_out_scenes, "r")
    optimizers = loop.Optimizers(llava, lambda name: ".layers." in name, options.rate_b, options.steps_b)
    eager = models.llama_layer
    if options.compile:
        torch._dynamo.config.recompile_limit = 64
        models.llama_layer = torch.compile(eager, dynamic=False)
    compiled = models.llama_layer
    log = loop.Log(folder / "stage_b.jsonl", rank)
    checkpoint = folder / "stage_b.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=loop.device())
        llava.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        first = state["step"]
    rng = np.random.default_rng((options.seed, rank, first))
    shared = np.random.default_rng((options.seed, first))
    questions = Questions(tokenizer, loop.device())
    size = options.batch_b // workers
    some = min(1000, options.held_out_scenes)
    align_until = options.steps_b // 4
    sums: dict[str, float] = {}
    for step in range(first, options.steps_b):
        index = rng.integers(0, options.feature_scenes, size)
        ids, valid, targets = questions.encode(draw(arrays, index, rng), True)
        share = KEEP[shared.choice(len(KEEP), p=ODDS)]
        kept = None
        if share < 1:
            order = torch.from_numpy(rng.random((size, models.PATCHES), np.float32)).argsort(1)
            kept = order[:, : round(share * models.PATCHES)].sort(1).values.to(loop.device())
        seen = torch.from_numpy(feats[index]).view(torch.bfloat16).to(loop.device())
        logits, image = forward(llava, seen, kept, ids, valid, 2)
        answer_loss = F.cross_entropy(logits[:, :, 0].flatten(0, 1), targets[:, :, 0].flatten())
        loss = answer_loss + 0.1 * F.cross_entropy(logits[:, :, 1].flatten(0, 1), targets[:, :, 1].flatten())
        if step < align_until:
            table = patch_words(arrays["things"][index], arrays["patches"][index], questions.ids).to(loop.device())
            if kept is not None:
                table = table.gather(1, kept[..., None].expand(-1, -1, table.shape[-1]))
            loss = loss + 0.5 * (1 - step / align_until) * alignment(llava, image, table)
        loss.backward()
        norm = optimizers.step(step)
        hit = (logits[:, :, 0].argmax(-1) == targets[:, :, 0]).float().mean(0)
        sums["loss"] = sums.get("loss", 0.0) + answer_loss.item()
        place = 0
        for family, count in MIX.items():
            sums[family] = sums.get(family, 0.0) + hit[place : place + count].mean().item()
            place += count
        if (step + 1) % 100 == 0:
            log(step=step + 1, norm=norm, **{name: value / 100 for name, value in sums.items()})
            sums = {}
        if (step + 1) % 500 == 0 or step + 1 == options.steps_b:
            if rank == 0:
                models.llama_layer = eager  # other shapes
                for keep in (None, 16):
                    figures = evaluate(llava, held_out_feats, held_out, questions, some, keep, options.seed)
                    log(step=step + 1, held_out=True, keep=keep or models.PATCHES, **figures)
                models.llama_layer = compiled
                content = {"model": llava.state_dict(), "optimizers": optimizers.state_dict(), "step": step + 1}
                loop.save(checkpoint, content)
            if dist.is_initialized():
                dist.barrier()
    if rank == 0:
        loop.save(folder / "stage_b_done.pt", {"model": llava.state_dict()})
