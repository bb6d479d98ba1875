"""Stage B: projector and language model, from answers. The vision tower is frozen, its features are computed once.

Many questions per scene go through one forward: each sees the image and itself only. The model sees all image tokens;
`--drop` keeps a random share at the language model's input, as an ablation. Attention is not supervised. A decaying loss
aligns the projected patches of an object with the first pieces of the words for it, and those of a sign with the pieces of
what it says, both through the head and in the input embeddings. Some of the questions of a scene make room for more of
those that have two answers, which stay at chance for longest. `--start-b` trains a finished model on.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from experiments.scenes2 import cache, loop, models, stage_a
from experiments.scenes2.cache import MOST, NAMES, TEXTS
from ivtp.data.scenes2 import words
from ivtp.data.scenes2.questions import FAMILIES, FORMS, SIDES, ask_exist, ask_logic, ask_side, which_are_there

SHARP = 14.0  # of the cosines with the input embeddings
DROP, ODDS = (1.0, 1 / 3, 1 / 9), (0.45, 0.25, 0.3)
HALVES = (8, 10, 0, 0), (2, 0, 6, 0)
"""In each half of the steps: questions of a scene that make room, and exist, logic and spatial questions that come in."""
ON = (8, 4, 2, 6)
"""The same where a finished model is trained on."""
APART = 0.2
"""Of the side: how far the centres of what is visible of two objects must differ for a spatial question."""


def load_joint(path: Path, patches: int) -> models.Joint:
    """Stage A's networks from a checkpoint."""
    joint, _ = stage_a.build(patches)
    joint.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model"])
    return joint


@torch.no_grad()
def compute_features(rank: int, workers: int, folder: Path, paths: list[Path], patches: int) -> None:
    """Features of shards; each worker takes its share."""
    joint = load_joint(folder / "stage_a_done.pt", patches).eval().to(loop.device())
    for path in paths[rank::workers]:
        encode(joint.vision, cache.Shard(path))


@torch.no_grad()
def encode(vision, shard: cache.Shard) -> None:
    """Penultimate features (scenes, n, width) of a shard, bfloat16 as int16, beside it, if they are not there yet."""
    if (shard.path / "features.npy").exists():
        return
    images, part = shard.images, shard.path / "features.part.npy"
    patches = (images.shape[1] // models.PATCH) ** 2
    out = np.lib.format.open_memmap(part, "w+", np.int16, (len(images), patches, models.WIDTH))
    for start in range(0, len(images), 50):
        some = torch.from_numpy(np.array(images[start : start + 50])).to(loop.device())
        states, _ = models.fast_vision(vision, models.normalise(some))
        out[start : start + 50] = states[:, 1:].to(models.LOW).view(torch.int16).cpu().numpy()
    out.flush()
    part.rename(shard.path / "features.npy")


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
def answers(
    llava, shard: cache.Shard, encoder: Encoder, scenes: int, mode: str = "all", extra: bool = False
) -> Iterator[tuple[int, str, bool]]:
    """Scene, group and correctness of the answers to the questions of a held-out shard.

    Groups are families; with `extra` also "early" (first piece, read out after part 1), and size, salience and negatives.

    Args:
        llava: projector and language model.
        shard: with features.
        encoder: of texts.
        scenes: how many.
        mode: `all` tokens; `random` or `oracle` 1/9 of them (one question at a time for the oracle); `blind`: no image;
            `shuffled`: the image of another scene.
        extra: also the other groups.
    """
    patches = (shard.images.shape[1] // models.PATCH) ** 2
    scenes, rng = min(scenes, len(shard)), np.random.default_rng(1)
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
                scene = int(index[i // len(FAMILIES) if mode == "oracle" else i])
                yield scene, family, value
                if extra:
                    place = first[i, j, 0]
                    yield scene, "early", (middle[i, j, place].argmax() == targets[i, j, place]).item()
                    for kind, level in zip(("size", "salience", "negatives"), question[5:8], strict=True):
                        if level:
                            yield scene, f"{kind}: {level}", value


def evaluate(*arguments, **more) -> dict[str, float]:
    """Mean of every group of `answers`, and the average over the families."""
    right: dict[str, list[bool]] = {}
    for _, group, value in answers(*arguments, **more):
        right.setdefault(group, []).append(value)
    result = {name: sum(values) / len(values) for name, values in right.items()}
    return result | {"average": sum(result[family] for family in FAMILIES) / len(FAMILIES)}


class More:
    """More questions with two answers about scenes. Of the absent things half are in a neighbour of the batch."""

    def __init__(self):
        self.truth, terms = stage_a.Truth(), set(words.terms()) - words.NOT_ASKED
        self.terms = np.array([i for i, term in enumerate(stage_a.TERMS) if term in terms])

    def __call__(
        self, shard: cache.Shard, index: np.ndarray, counts: tuple[int, int, int], rng: np.random.Generator
    ) -> list[list[tuple]]:
        """For each scene so many exist, logic and spatial questions, in the form of the cache's, without targets."""
        exist, logic, spatial = counts
        nothing_written = np.full_like(shard.signs[index], -1)
        truth = self.truth(shard.things[index], nothing_written, shard.places[index])[:, self.terms]
        shown = np.flatnonzero((truth > 0).any(0))
        shapes = shard.patches(index)[:, :MOST] if spatial else [None] * len(truth)
        groups = []
        for row, things, shape in zip(truth, shard.things[index], shapes, strict=True):
            there, near, absent = np.flatnonzero(row > 0), shown[row[shown] < 0], np.flatnonzero(row < 0)

            def term(present: bool, pools=(there, near, absent)) -> str:
                pool = pools[0] if present else pools[1 + int(rng.random() < 0.5)]
                return stage_a.TERMS[self.terms[rng.choice(pool)]]

            group = self.sides(things[:, 0], shape, spatial, rng) if spatial else []
            for _ in range(exist + spatial - len(group)):
                yes = rng.random() < 0.5
                group.append(("exist", ask_exist(rng, term(yes)), "yes" if yes else "no"))
            for _ in range(logic):
                form, yes = FORMS[rng.integers(len(FORMS))], rng.random() < 0.5
                first, second = which_are_there(rng, form, yes)
                a, b = term(first), term(second)
                while words.terms()[a] & words.terms()[b]:
                    a, b = term(first), term(second)
                group.append(("logic", ask_logic(form, a, b), "yes" if yes else "no"))
            groups.append(group)
        return groups

    def sides(self, concepts: np.ndarray, shape: np.ndarray, count: int, rng: np.random.Generator) -> list[tuple]:
        """So many questions on which side of another object an object is; none where all are too close.

        concepts  of the objects of a scene, -1: none
        shape     (objects, patches): which patches show them
        """
        side = int(shape.shape[1] ** 0.5)
        place = np.stack(np.divmod(np.arange(side * side), side)[::-1], 1) / side
        once = [i for i in np.flatnonzero((concepts >= 0) & shape.any(1)) if (concepts == concepts[i]).sum() == 1]
        centre = {i: place[shape[i]].mean(0) for i in once}
        pairs = [
            (i, j, axis)
            for i in once
            for j in once
            for axis in (0, 1)
            if abs(centre[i][axis] - centre[j][axis]) >= APART
        ]
        group = []
        for _ in range(count if pairs else 0):
            i, j, axis = pairs[rng.integers(len(pairs))]
            low, high = SIDES[axis]
            text = ask_side(NAMES[concepts[i]], NAMES[concepts[j]], low, high)
            group.append(("spatial", text, low if centre[i][axis] < centre[j][axis] else high))
        return group


def first_pieces(encoder: Encoder, size: int) -> torch.Tensor:
    """First pieces of the words for every concept and tint (concepts + tints, vocabulary); rows sum to 1."""
    table = torch.zeros(len(NAMES) + len(words.COLORS), size)
    for row, name in enumerate(NAMES):
        terms = words.terms_of(name)
        spoken = {words.singular(term) for term in terms} | {words.plural(t) for t in terms if t in words.hypernyms()}
        for text in spoken:
            table[row, encoder.ids(text)[0]] = 1
        table[row, encoder.ids(name)[0]] += 2  # the name counts most
    for row, color in enumerate(words.COLORS, start=len(NAMES)):
        table[row, encoder.ids(color)[0]] = 1
    return table / table.sum(1, keepdim=True)


def sign_pieces(encoder: Encoder, size: int) -> torch.Tensor:
    """Pieces of what signs say, and of their colours (texts + colours, vocabulary); rows sum to 1."""
    table = torch.zeros(len(TEXTS) + len(words.SIGN_COLORS), size)
    for row, text in enumerate((*TEXTS, *words.SIGN_COLORS)):
        ids = encoder.ids(text)
        for piece in ids:
            table[row, piece] += 1 / len(ids)
    return table


def alignment(
    llava, image: torch.Tensor, shard: cache.Shard, index: np.ndarray, pieces: torch.Tensor, written: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the projected patches of objects and signs with the words for them: through the final norm and the
    head, and by cosine with the input embeddings."""
    shown, things = torch.from_numpy(shard.patches(index)), torch.from_numpy(shard.things[index].astype(np.int64))
    scene, thing, patch = shown[:, :MOST].nonzero(as_tuple=True)
    concept, tint = things[scene, thing, 0], things[scene, thing, 1]
    wanted = pieces[concept]
    tinted = (tint >= 0)[:, None]
    wanted = torch.where(tinted, 0.7 * wanted + 0.3 * pieces[len(NAMES) + tint.clamp(min=0)], wanted)
    on, sign, at = shown[:, MOST:].nonzero(as_tuple=True)
    color, text = torch.from_numpy(shard.signs[index].astype(np.int64))[on, sign].unbind(-1)
    wanted = torch.cat((wanted, 0.7 * written[text] + 0.3 * written[len(TEXTS) + color])).to(image.device)
    states = image[torch.cat((scene, on)).to(image.device), torch.cat((patch, at)).to(image.device)]
    language = llava.model.language_model
    near = F.normalize(states, dim=-1) @ F.normalize(language.embed_tokens.weight, dim=-1).T
    through = llava.lm_head(models.rms(language.norm, states))
    return 0.5 * (F.cross_entropy(through, wanted) + F.cross_entropy(SHARP * near, wanted))


def new_model(patches: int, seed: int):
    """Projector and language model at their start, and the tokenizer."""
    torch.manual_seed(seed)
    tokenizer, _ = models.tokenizers()
    llava = models.new_llava(tokenizer, patches)
    models.start_like_identity(llava.model.language_model)
    with torch.no_grad():
        llava.lm_head.weight.copy_(llava.model.language_model.embed_tokens.weight)
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
    elif options.start_b and not blind:
        llava.load_state_dict(torch.load(options.start_b, weights_only=True, map_location=loop.device())["model"])
    rng, shared = np.random.default_rng((options.seed, rank, first, 2)), np.random.default_rng((options.seed, first, 3))
    encoder = Encoder(tokenizer)
    pieces, written = first_pieces(encoder, len(tokenizer)), sign_pieces(encoder, len(tokenizer))
    size, more_questions = options.batch_b // workers, More()
    sums: dict[str, list[float]] = {}
    for step in range(first, steps):
        which = rng.integers(len(shards))
        shard = shards[which]
        index = np.sort(rng.choice(len(shard), size, replace=False))
        groups = [shard.questions[i] for i in index]
        if not blind:
            out, *counts = ON if options.start_b else HALVES[2 * step // steps]
            columns = np.sort(rng.choice(len(groups[0]), len(groups[0]) - out, replace=False))
            more = more_questions(shard, index, counts, rng)
            groups = [[group[i] for i in columns] + new for group, new in zip(groups, more, strict=True)]
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
        if not blind and kept is None and not options.start_b:
            total = loss + (1 - step / steps) * alignment(llava, image, shard, index, pieces, written)
        total.backward()
        for p in optimizers.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = optimizers.step(step)
        hit = hits(logits.detach(), targets).float().mean(0)
        sums.setdefault("loss", []).append(loss.item())
        for question, value in zip(groups[0], hit.tolist(), strict=True):
            sums.setdefault(question[0], []).append(value)
        last = step + 1 == steps
        if (step + 1) % options.log_every == 0:
            log(step=step + 1, norm=norm, **{name: sum(values) / len(values) for name, values in sums.items()})
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
