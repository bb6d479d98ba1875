"""Stage A: vision tower and text encoder, from image-text contrast and a light dense label that fades.

Losses:
- captions: sigmoid contrast (SigLIP) of the class token with *partial* captions, which name one to three of the four
  most salient objects (synonyms and hypernyms at random, some with their colour), the place, or a sign. A caption that
  happens to be true of another picture of the batch is no negative of it.
- words: sigmoid contrast of the class token with each token of questions and captions, in its context. Positive where its
  term is true of the picture (less weight if only objects beyond the captions make it true), ignored where the term is
  in doubt there. The logit is `scale * (cosine - 0.2)`: a word is true beyond 0.2, the threshold of instruction-guided
  pruning in the paper. Function words are always negative. The words are those of some questions and captions, and terms
  alone: half of them true of some picture of the batch.
- dense: which concept a patch of an object shows, which tint, and what a patch of a sign says. Its weight falls to zero
  with the last step. No loss knows a place; attention is not supervised.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from experiments.scenes2 import cache, loop, models
from experiments.scenes2.cache import MOST, NAMES, TEXTS
from ivtp.data.scenes2 import words
from ivtp.data.scenes2.assets import places
from ivtp.data.scenes2.questions import SALIENT

TAU = 0.2
KINDS, TINTS = len(NAMES), len(words.COLORS) + 1
SIGN_CLASSES = (len(words.SIGN_WORDS) + 1, 11, 11)  # word, tens, ones; the last of each: not this kind
LABELS = KINDS + TINTS + sum(SIGN_CLASSES)
TERMS = tuple(sorted({*words.terms(), *words.COLORS, *words.SIGN_WORDS, "indoors", "outdoors", *cache.place_names()}))
_ID = {term: i for i, term in enumerate(TERMS)}
_SINGULAR = {words.plural(h): h for h in words.hypernyms()} | {words.singular(h): h for h in words.hypernyms()}
DROP = (1.0, 0.5, 0.33)


def _cover() -> np.ndarray:
    """(concepts, terms): whether a term covers a concept."""
    table = np.zeros((len(NAMES), len(TERMS)), bool)
    for i, name in enumerate(NAMES):
        table[i, [_ID[term] for term in words.terms_of(name)]] = True
    return table


def _doubt() -> tuple[np.ndarray, np.ndarray]:
    """(concepts, terms) and (places, terms): where a term is in doubt though nothing it covers was drawn."""
    by_concept = np.zeros((len(NAMES), len(TERMS)), bool)
    for i, name in enumerate(NAMES):
        for other in words.confusable(name):
            by_concept[i, [_ID[term] for term in words.terms_of(other)]] = True
    by_place = np.zeros((len(places("test")), len(TERMS)), bool)
    for place in places("test"):
        for name in place.shows:
            by_place[place.row, [_ID[term] for term in words.terms_of(name)]] = True
    return by_concept, by_place


class Truth:
    """Which terms are true of scenes: 1 true, 0.3 true of little salient objects only, 0 in doubt, -1 false."""

    def __init__(self):
        self.cover, (self.doubt, self.doubt_place) = _cover(), _doubt()
        self.colors = np.array([_ID[color] for color in words.COLORS])
        self.plain = np.ones(len(TERMS), bool)
        self.plain[self.colors] = False

    def __call__(self, things: np.ndarray, signs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(scenes, terms) for arrays of the cache."""
        n = len(things)
        out = np.full((n, len(TERMS)), -1, np.float32)
        for i in range(n):
            there = things[i][things[i, :, 0] >= 0]
            ids = there[:, 0]
            out[i, self.doubt[ids].any(0) | self.doubt_place[rows[i]]] = 0
            out[i, self.colors] = 0  # an object that is not tinted may have the colour, too
            low, high = ids[there[:, 2] >= SALIENT], ids[there[:, 2] < SALIENT]
            out[i, self.cover[low].any(0)] = 0.3
            out[i, self.cover[high].any(0)] = 1
            tinted = there[(there[:, 1] >= 0) & (there[:, 2] < SALIENT), 1]
            out[i, self.colors[tinted]] = 1
            place = places("test")[rows[i]]
            out[i, [_ID[place.place], _ID[place.where]]] = 1
            for color, text in signs[i][signs[i, :, 0] >= 0]:
                out[i, _ID[list(words.SIGN_COLORS)[color]]] = 1
                if TEXTS[text] in _ID:
                    out[i, _ID[TEXTS[text]]] = 1
        return out


Mention = tuple[tuple[str, ...], str]  # what must hold, and how it is said


def mentions(things: np.ndarray, signs: np.ndarray, row: int, rng: np.random.Generator) -> list[Mention]:
    """One to three things that a caption says."""
    salient = things[(things[:, 0] >= 0) & (things[:, 2] < SALIENT)]
    chosen = []
    for concept, tint, *_ in salient[rng.permutation(len(salient))[: rng.integers(1, 4)]].tolist():
        options = words.terms_of(NAMES[concept])
        own = [term for term in options if term not in words.hypernyms() and term not in words.NOT_ASKED]
        wide = [term for term in options if term in words.hypernyms()]
        term = str(rng.choice(wide if wide and rng.random() < 0.12 else own))
        color = words.COLORS[tint] if tint >= 0 and rng.random() < 0.6 else ""
        said = f"{color} {words.singular(term)}".strip()
        chosen.append(
            ((f"{color}|{term}",), words.indefinite(term) if not color else f"{_article(term, color)} {said}")
        )
    if rng.random() < 0.3:
        color, text = signs[rng.integers((signs[:, 0] >= 0).sum())].tolist()
        paint = list(words.SIGN_COLORS)[color]
        chosen.append(((f"sign|{paint}|{TEXTS[text]}",), f"{TEXTS[text]} written on a {paint} sign"))
    rng.shuffle(chosen)
    if rng.random() < 0.3:
        place = cache.place_names()[row]
        chosen.append(((f"place|{place}",), f"in {'an' if place[0] in 'aeiou' else 'a'} {place}"))
    return chosen


def _article(term: str, color: str) -> str:
    return "some" if term in words.MASS or term in words.PLURAL else "an" if color == "orange" else "a"


def facts(things: np.ndarray, signs: np.ndarray, row: int) -> set[str]:
    """All that a caption could say of a scene, in the form of `mentions`."""
    found = {f"place|{cache.place_names()[row]}"}
    for concept, tint, *_ in things[things[:, 0] >= 0].tolist():
        for term in words.terms_of(NAMES[concept]):
            found.add(f"|{term}")
            if tint >= 0:
                found.add(f"{words.COLORS[tint]}|{term}")
    for color, text in signs[signs[:, 0] >= 0].tolist():
        found.add(f"sign|{list(words.SIGN_COLORS)[color]}|{TEXTS[text]}")
    return found


def caption(said: list[Mention]) -> str:
    """Mentions as text."""
    listed = [text for _, text in said]
    place = listed.pop() if said[-1][0][0].startswith("place|") else ""
    return f"{' and '.join(listed)} {place}".strip()


class Batches:
    """Endless batches of a worker, from its own stream of random numbers."""

    def __init__(
        self, shards: list[cache.Shard], tokenizer, size: int, seed: tuple[int, ...], texts: int = 24, alone: int = 256
    ):
        self.shards, self.tokenizer, self.size, self.texts, self.alone = shards, tokenizer, size, texts, alone
        self.rng, self.truth = np.random.default_rng(seed), Truth()
        self.spoken = [words.singular(term) for term in TERMS]

    def __call__(self, shard: cache.Shard | None = None, index: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        rng = self.rng
        shard = shard or self.shards[rng.integers(len(self.shards))]
        if index is None:
            index = np.sort(rng.choice(len(shard), self.size, replace=False))
        things, signs, rows = shard.things[index], shard.signs[index], shard.places[index]
        said = [mentions(*scene, rng) for scene in zip(things, signs, rows, strict=True)]
        known = [facts(*scene) for scene in zip(things, signs, rows, strict=True)]
        captions = [caption(s) for s in said]
        needed = [{fact for facts_, _ in s for fact in facts_} for s in said]
        match = np.array([[need <= facts_ for need in needed] for facts_ in known])
        texts, terms = list(captions), [[] for _ in captions]
        for _ in range(self.texts):  # questions about these and other scenes, and bare words
            if rng.random() < 0.5:
                questions = shard.questions[
                    int(rng.choice(index)) if rng.random() < 0.6 else int(rng.integers(len(shard)))
                ]
                question = questions[rng.integers(len(questions))]
                texts.append(question[1])
                terms.append([_SINGULAR.get(t, t) for t in question[3]])
            else:
                present = things[rng.integers(len(index))]
                name = (
                    NAMES[rng.choice(present[present[:, 0] >= 0, 0])] if rng.random() < 0.6 else str(rng.choice(NAMES))
                )
                term = str(rng.choice(words.terms_of(name)))
                texts.append(f"{words.indefinite(term)}" if rng.random() < 0.5 else words.singular(term))
                terms.append([term])
        encoded = self.tokenizer(texts, padding=True, return_offsets_mapping=True, return_tensors="np")
        # Which term a token belongs to: -1 a function word, -2 not used.
        of = np.full(encoded["input_ids"].shape, -1, np.int64)
        of[encoded["attention_mask"] == 0] = -2
        of[encoded["input_ids"] >= len(self.tokenizer) - 2] = -2
        of[: len(captions)] = -2
        for row in range(len(captions), len(texts)):
            for term in terms[row]:
                spoken = next(form for form in (_plural(term), words.singular(term), term) if form in texts[row])
                start = texts[row].index(spoken)
                inside = (encoded["offset_mapping"][row, :, 0] >= start) & (
                    encoded["offset_mapping"][row, :, 1] <= start + len(spoken)
                )
                of[row, inside & (of[row] > -2)] = _ID.get(term, -2)
        truth = self.truth(things, signs, rows)
        there = np.flatnonzero((truth > 0).any(0))
        chosen = rng.choice(there, min(self.alone // 2, len(there)), replace=False)
        others = np.setdiff1d(np.arange(len(TERMS)), chosen)
        chosen = np.concatenate((chosen, rng.choice(others, self.alone - len(chosen), replace=False)))
        terms_alone = self.tokenizer([self.spoken[i] for i in chosen], padding=True, return_tensors="np")
        of_alone = np.repeat(chosen[:, None], terms_alone["input_ids"].shape[1], 1)
        of_alone[(terms_alone["attention_mask"] == 0) | (terms_alone["input_ids"] >= len(self.tokenizer) - 2)] = -2
        batch = {
            "ids_alone": terms_alone["input_ids"],
            "mask_alone": terms_alone["attention_mask"],
            "of_alone": of_alone,
            "images": np.ascontiguousarray(shard.images[index]),
            "things": things.astype(np.int64),
            "signs": signs.astype(np.int64),
            "shown": shard.patches(index),
            "ids": encoded["input_ids"],
            "mask": encoded["attention_mask"],
            "match": match,
            "of": of,
            "truth": truth,
        }
        return {name: torch.from_numpy(np.array(value)).to(loop.device()) for name, value in batch.items()}


def _plural(term: str) -> str:
    return words.plural(term) if term in words.hypernyms() else term


def dense_loss(head, states: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy on patches of objects and signs, and the share of object patches named right."""
    shown, things, signs = batch["shown"], batch["things"], batch["signs"]
    scene, thing, patch = shown[:, :MOST].nonzero(as_tuple=True)
    logits = head(states[scene, patch])
    kinds, tints = logits[:, :KINDS], logits[:, KINDS : KINDS + TINTS]
    kind = things[scene, thing, 0]
    tint = things[scene, thing, 1].where(things[scene, thing, 1] >= 0, TINTS - 1)
    loss = F.cross_entropy(kinds, kind) + 0.5 * F.cross_entropy(tints, tint)
    scene, sign, patch = shown[:, MOST:].nonzero(as_tuple=True)
    logits = head(states[scene, patch])[:, KINDS + TINTS :]
    labels = _SIGN_LABELS.to(signs.device)[signs[scene, sign, 1]]
    for part, label in zip(logits.split(SIGN_CLASSES, -1), labels.unbind(-1), strict=True):
        loss = loss + 0.3 * F.cross_entropy(part, label)
    return loss, (kinds.argmax(-1) == kind).float().mean()


def _sign_labels() -> torch.Tensor:
    rows = []
    for text in TEXTS:
        digits = text.removeprefix("$")
        if digits.isdigit():
            tens = int(digits[-2]) if len(digits) > 1 else 10
            rows.append((SIGN_CLASSES[0] - 1, tens, int(digits[-1])))
        else:
            rows.append((words.SIGN_WORDS.index(text), 10, 10))
    return torch.tensor(rows)


_SIGN_LABELS = _sign_labels()


def losses(model: models.Joint, batch: dict, kept: torch.Tensor | None, dense: float) -> dict[str, torch.Tensor]:
    """All parts of the loss."""
    states, cls = models.fast_vision(model.vision, models.normalise(batch["images"]), kept)
    n = len(batch["images"])
    result = {}
    if dense > 0 and kept is None:
        loss, named = dense_loss(model.head, states[:, 1:], batch)
        result["dense"] = dense * loss
        result["dense_unweighted"], result["named"] = loss.detach(), named
    image = F.normalize(model.visual_projection(cls), dim=-1)
    whole, tokens = text_features(model.text, batch["ids"], batch["mask"])
    logits = model.caption_scale.exp() * image @ whole[:n].T + model.caption_bias
    own = torch.eye(n, dtype=torch.bool, device=image.device)
    losing = F.softplus(logits)[~batch["match"]]
    result["caption"] = F.softplus(-logits[own]).mean() + losing.sum() / n
    _, alone = text_features(model.text, batch["ids_alone"], batch["mask_alone"])
    pairs = ((tokens, batch["of"]), (alone, batch["of_alone"]))
    tokens, of = torch.cat([t[o >= -1] for t, o in pairs]), torch.cat([o[o >= -1] for _, o in pairs])
    function = (of == -1)[None].expand(n, -1)
    truth = batch["truth"][:, of.clamp(min=0)].masked_fill(function, -1)
    logits = model.word_scale.exp() * (image @ tokens.T - TAU)
    right, wrong = F.softplus(-logits), F.softplus(logits)
    positive, negative = truth.clamp(min=0), (truth < 0).float()
    content = negative * ~function
    result["words"] = (
        (right * positive).sum() / positive.sum().clamp(min=1)
        + 5 * (wrong * content).sum() / content.sum().clamp(min=1)
        + 0.5 * (wrong * function).sum() / function.sum().clamp(min=1)
    )
    return result


def text_features(text, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised features of whole texts (n, joint) and of each of their tokens (n, t, joint)."""
    out = text(input_ids=ids, attention_mask=mask)
    return F.normalize(out.text_embeds, dim=-1), F.normalize(text.text_projection(out.last_hidden_state), dim=-1)


@torch.no_grad()
def evaluate(model: models.Joint, shard: cache.Shard, tokenizer, scenes: int = 256) -> dict[str, float]:
    """Held-out figures: words against τ, captions, patches named right (while the head is trained), attention of CLS."""
    batches = Batches([shard], tokenizer, 64, (7,))
    sums: dict[str, list[float]] = {}

    def add(name: str, value: torch.Tensor) -> None:
        entry = sums.setdefault(name, [0.0, 0.0])
        entry[0] += value.float().sum().item()
        entry[1] += value.numel()

    model.eval()
    scenes = min(scenes, len(shard))
    for start in range(0, scenes, 64):
        batch = batches(shard, np.arange(start, min(start + 64, scenes)))
        n = len(batch["images"])
        states, cls = models.fast_vision(model.vision, models.normalise(batch["images"]))
        add("patch_named", dense_loss(model.head, states[:, 1:], batch)[1])
        image = F.normalize(model.visual_projection(cls), dim=-1)
        whole, tokens = text_features(model.text, batch["ids"], batch["mask"])
        scores = image @ whole[:n].T
        add("caption_first", batch["match"][torch.arange(n), scores.argmax(1)])
        of = batch["of"]
        passes = image @ tokens[of >= 0].T >= TAU
        truth = batch["truth"][:, of[of >= 0]]
        add("tau_true", passes[truth > 0])
        add("tau_true_salient", passes[truth == 1])
        add("tau_false", passes[truth < 0])
        add("tau_function", image @ tokens[of == -1].T >= TAU)
    model.train()
    return {name: total / max(count, 1) for name, (total, count) in sums.items()}


@torch.no_grad()
def attention_statistics(vision, images: np.ndarray, objects: np.ndarray) -> str:
    """Attention of CLS per layer: on itself / effective number of patches / share on objects; and the objects' area."""
    model = models.tower(vision)
    x = models.normalise(torch.from_numpy(np.array(images)).to(model.post_layernorm.weight.device))
    x = F.linear(x, model.embeddings.patch_embedding.weight.flatten(1))
    cls = model.embeddings.class_embedding.expand(len(x), 1, -1)
    x = model.pre_layrnorm(torch.cat((cls, x), 1) + model.embeddings.position_embedding.weight)
    mask = torch.from_numpy(objects).float().to(x.device)
    rows = []
    for layer in model.encoder.layers:
        h = layer.layer_norm1(x)
        q, k = (
            project(h).view(len(x), -1, models.HEADS, models.HEAD).transpose(1, 2)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        attention = (q[:, :, :1] @ k.transpose(-1, -2) * models.HEAD**-0.5).softmax(-1)[:, :, 0].mean(1)
        over = attention[:, 1:] / attention[:, 1:].sum(1, keepdim=True)
        held = (-(over * over.clamp(min=1e-12).log()).sum(1)).exp().mean().item()
        rows.append(f"{attention[:, 0].mean().item():.2f}/{held:.0f}/{(over * mask).sum(1).mean().item():.2f}")
        x = models.clip_layer(layer, x)
    return " ".join(rows) + f" area {mask.mean().item():.2f}"


def build(patches: int) -> tuple[models.Joint, object]:
    _, tokenizer = models.tokenizers()
    return models.Joint(tokenizer, patches, LABELS), tokenizer


def draw_kept(share: float, size: int, patches: int, generator: torch.Generator) -> torch.Tensor | None:
    """Indices (size, n) of a random share of the patches; None for all."""
    if share == 1:
        return None
    order = torch.rand(size, patches, generator=generator).argsort(1)
    return order[:, : round(share * patches)].sort(1).values.to(loop.device())


def train(rank: int, workers: int, folder: Path, options) -> None:
    """One worker of stage A; resumes from `stage_a.pt`, ends with `stage_a_done.pt`."""
    torch.manual_seed(options.seed)
    model, tokenizer = build(options.size)
    if options.start:
        model.load_state_dict(torch.load(options.start, weights_only=True, map_location="cpu")["model"])
    model.to(loop.device())
    side = models.SIDES[options.size]
    held_out = cache.Shard(cache.wait(folder, "validation", options.seed, side)[0])
    optimizers = loop.Optimizers(model, lambda name: ".layers." in name, options.rate_a, options.steps_a)
    log = loop.Log(folder / "stage_a.jsonl", rank)
    checkpoint = folder / "stage_a.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=loop.device())
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        first = state["step"]
    batches = Batches([], tokenizer, options.batch_a // workers, (options.seed, rank, first))
    shared = np.random.default_rng((options.seed, first))  # the same ratio in all workers, which wait for each other
    generator = torch.Generator().manual_seed(options.seed + 1000 * first + rank)
    sums: dict[str, float] = {}
    for step in range(first, options.steps_a):
        if step == first or step % 50 == 0:
            known = {shard.path: shard for shard in batches.shards}
            paths = cache.wait(folder, "train", options.seed, side)
            batches.shards = [known.get(path) or cache.Shard(path) for path in paths]
        share = DROP[shared.choice(len(DROP), p=(0.3, 0.4, 0.3))] if options.drop else 1.0
        kept = draw_kept(share, batches.size, options.size, generator)
        dense = options.dense * (1 - step / options.steps_a)
        parts = losses(model, batches(), kept, dense)
        sum(value for value in parts.values() if value.requires_grad).backward()
        for p in optimizers.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = optimizers.step(step)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        last = step + 1 == options.steps_a
        if (step + 1) % options.log_every == 0:
            passed = {name: value / options.log_every for name, value in sums.items()}
            log(step=step + 1, shards=len(batches.shards), norm=norm, **passed)
            sums = {}
        if (step + 1) % options.save_every == 0 or last:
            if rank == 0:
                content = {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "step": step + 1}
                loop.save(checkpoint, content)
            if dist.is_initialized():
                dist.barrier()
        if rank == 0 and ((step + 1) % options.check_every == 0 or last):
            some = held_out.images[:64], held_out.patches(np.arange(min(64, len(held_out)))).any(1)
            log(step=step + 1, held_out=True, **evaluate(model, held_out, tokenizer))
            log(step=step + 1, cls=attention_statistics(model.vision, *some))
    if rank == 0:
        loop.save(folder / "stage_a_done.pt", {"model": model.state_dict()})
