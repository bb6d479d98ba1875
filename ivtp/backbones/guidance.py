"""CLIP text encoders, from transformers or open_clip, and the guide that aligns their tokens with the LLM's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ivtp.pruning.cost import Layers
from ivtp.pruning.instruction import Span, Spelled, align, relevance, squeeze, squeezed_spans


class TextEncoder(Protocol):
    """The text half of the CLIP that the vision tower comes from; `sizes`, `context` and `joint` are for its cost."""

    sizes: Layers
    context: int
    joint: int

    def encode(self, texts: Sequence[str]) -> list[Spelled]:
        """Eq. 5: of each text every token's feature in the joint space, begin and end marks left out."""

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Each text as a whole in the joint space, one row per chunk of the context "m d"."""

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens that it reads of each text, the two marks of a chunk included: what `cost` asks for."""

    def project(self, cls: Tensor) -> Tensor:
        """The visual CLS "b d", after the tower's last norm, in the joint space."""


class TransformersText:
    """`CLIPTextModelWithProjection` and the visual projection of the same CLIP checkpoint."""

    def __init__(self, model: nn.Module, tokenizer, visual_projection: Tensor) -> None:
        self.model, self.tokenizer, self.visual_projection = model, tokenizer, visual_projection
        self.sizes = text_layers(model.config)
        self.context = model.config.max_position_embeddings
        self.joint, self.vision_width = visual_projection.shape

    def encode(self, texts: Sequence[str]) -> list[Spelled]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        features = encode_chunks(encoded["input_ids"], marks, self.context, self._features)
        spans = [squeezed_spans(text, o) for text, o in zip(texts, encoded["offset_mapping"], strict=True)]
        return [Spelled(s, f) for s, f in zip(spans, features, strict=True)]

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return encode_chunks(ids, marks, self.context, self._features, pooled=True)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) + 2 for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def _features(self, rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        padded = [row + [row[-1]] * (longest - len(row)) for row in rows]
        hidden = self.model.text_model(input_ids=torch.tensor(padded, device=self.model.device)).last_hidden_state
        return self.model.text_projection(hidden)

    def project(self, cls: Tensor) -> Tensor:
        return cls @ self.visual_projection.T.to(cls)


class OpenClipText:
    """The text tower of an open_clip CLIP, alone or within it, and its visual projection (default: the whole CLIP's own)."""

    def __init__(self, model: nn.Module, tokenizer, visual_projection: Tensor | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.visual_projection = model.visual.proj if visual_projection is None else visual_projection
        if getattr(model, "attn_mask", None) is None or not hasattr(tokenizer, "byte_decoder"):
            raise ValueError(
                "this open_clip model has no causal text tower with CLIP's own tokenizer; use another CLIP"
            )
        block = model.transformer.resblocks[0]
        width, heads = block.attn.embed_dim, block.attn.num_heads
        depth, ffn = len(model.transformer.resblocks), block.mlp.c_fc.out_features
        self.sizes = Layers(depth, width, ffn, heads, heads, width // heads, 2)
        self.context = model.context_length
        self.vision_width, self.joint = self.visual_projection.shape

    def encode(self, texts: Sequence[str]) -> list[Spelled]:
        ids = [self.tokenizer.encode(text) for text in texts]
        marks = (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id)
        features = encode_chunks(ids, marks, self.context, self._features)
        spans = [self._spans(text, tokens) for text, tokens in zip(texts, ids, strict=True)]
        return [Spelled(s, f) for s, f in zip(spans, features, strict=True)]

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        ids = [self.tokenizer.encode(text) for text in texts]
        marks = (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id)
        return encode_chunks(ids, marks, self.context, self._features, pooled=True)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(self.tokenizer.encode(text)) + 2 for text in texts]

    def _features(self, rows: list[list[int]]) -> Tensor:
        model, n = self.model, max(map(len, rows))
        padded = torch.tensor([row + [0] * (n - len(row)) for row in rows], device=model.positional_embedding.device)
        # As its encode_text, which can only read a whole context and returns the end mark alone.
        x = model.token_embedding(padded) + model.positional_embedding[:n]
        x = x.to(model.transformer.get_cast_dtype())
        hidden = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
        projection = model.text_projection
        return projection(hidden) if isinstance(projection, nn.Linear) else hidden @ projection

    def project(self, cls: Tensor) -> Tensor:
        return cls @ self.visual_projection.to(cls)

    def _spans(self, text: str, ids: Sequence[int]) -> list[Span]:
        """open_clip's tokenizer has no offsets, but its tokens are bytes: of the cleaned text, whose letters are matched
        with the text's own. A token of letters that only cleaning brought in spells nothing (an empty span)."""
        pieces = [self.tokenizer.decoder[token].removesuffix("</w>") for token in ids]
        raw = [bytes(self.tokenizer.byte_decoder[c] for c in piece) for piece in pieces]
        cleaned = b"".join(raw).decode("utf-8", errors="replace")
        letter_of = [i for i, letter in enumerate(cleaned) for _ in letter.encode()]
        place = letters_of(cleaned, text)
        spans, at = [], 0
        for piece in raw:
            found = [place[i] for i in letter_of[at : at + len(piece)] if i in place]
            at += len(piece)
            spans.append((min(found), max(found) + 1) if found else (0, 0))
        return spans


def letters_of(spelled: str, text: str) -> dict[int, int]:
    """For each letter that tokens spell, which letter of the squeezed text it is; of those that only cleaning brought in,
    nothing. Ligatures and wide letters are spelled out: they are shared evenly."""
    lowered = [(low, i) for i, letter in enumerate(squeeze(text)) for low in letter.lower()]
    place: dict[int, int] = {}
    matcher = difflib.SequenceMatcher(None, spelled, [low for low, _ in lowered], autojunk=False)
    for kind, start, stop, first, last in matcher.get_opcodes():
        if kind in ("equal", "replace"):
            step = (last - first) / (stop - start)
            place.update((i, lowered[first + int((i - start) * step)][1]) for i in range(start, stop))
    return place


def text_layers(config) -> Layers:
    """Sizes of a transformers CLIP text config."""
    heads, width = config.num_attention_heads, config.hidden_size
    return Layers(config.num_hidden_layers, width, config.intermediate_size, heads, heads, width // heads, 2)


def encode_chunks(
    texts: Sequence[Sequence[int]],
    marks: tuple[int, int],
    context: int,
    features: Callable[[list[list[int]]], Tensor],
    pooled: bool = False,
) -> list[Tensor]:
    """Features of every token of every text, all in one batch; the encoder is causal, so padding behind is harmless.
    `pooled`: of the end mark of every chunk instead, which stands for all before it.

    A text longer than the context goes through in chunks, each with its own marks (the paper does not say; ours).
    """
    length = context - 2
    rows, owner = [], []
    for number, ids in enumerate(texts):
        for start in range(0, max(len(ids), 1), length):  # a text of no tokens is one chunk of two marks
            rows.append([marks[0], *ids[start : start + length], marks[1]])
            owner.append(number)
    found: list[list[Tensor]] = [[] for _ in texts]
    for number, row, hidden in zip(owner, rows, features(rows), strict=True):
        end = len(row) - 1
        found[number].append(hidden[end : end + 1] if pooled else hidden[1:end])
    return [torch.cat(parts) for parts in found]


Of = tuple[Sequence[int], int]


@dataclass(frozen=True)
class Prompt:
    """The text tokens of one prompt: places in the sequence, ids, letters of the instruction they spell."""

    places: list[int]
    ids: list[int]
    spans: list[Span]
    instruction: str


class Guide:
    """Relevance of each token of a prompt to its image (Eq. 5–7), for any two tokenizers.

    A token that spells no letter of the instruction, and every token of a prompt without text, has relevance -inf; where
    none is left, the visual CLS stands in for the pseudo CLS (Eq. 8).

    encoder       None where nothing is asked of CLIP
    instructions  the part of each prompt that CLIP reads (the question); default: all of the prompt's text
    """

    def __init__(self, tokenizer, encoder: TextEncoder | None, image_token_id: int) -> None:
        self.tokenizer, self.encoder, self.image_token_id = tokenizer, encoder, image_token_id
        marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        # A word without a token of its own is a word; begin and end marks, padding and roles are not.
        self.ignored = {image_token_id, *tokenizer.all_special_ids} - ({tokenizer.unk_token_id} - marks)
        self.instructions: Sequence[str] | None = None

    def __call__(
        self, input_ids: Tensor, valid: Tensor, cls: Tensor, of: Of | None = None
    ) -> tuple[Tensor, list[list[tuple[str, float]]]]:
        """Relevance "b n" (-inf where a token is not part of the instruction), and per sample (token, relevance).

        of  which prompts of a larger batch these are, and how many it has; here and below
        """
        joint = self.encoder.project(cls)
        prompts = self._prompts(input_ids, valid, of)
        texts = list(dict.fromkeys(prompt.instruction for prompt in prompts))
        spelled = dict(zip(texts, self.encoder.encode(texts), strict=True))
        scores = torch.full(input_ids.shape, float("-inf"), device=input_ids.device)
        words = []
        for sample, prompt in enumerate(prompts):
            clip = spelled[prompt.instruction]
            aligned = align(relevance(joint[sample], clip.features), clip.spans, prompt.spans)
            scores[sample, torch.tensor(prompt.places, dtype=torch.long, device=scores.device)] = aligned
            words.append([(self.tokenizer.decode([i]), c) for i, c in zip(prompt.ids, aligned.tolist(), strict=True)])
        return scores, words

    def spelled_out(
        self, input_ids: Tensor, valid: Tensor, fit: Tensor, of: Of | None = None
    ) -> tuple[Tensor, list[list[tuple[str, float]]]]:
        """The same of a fit "b n" that needs no text encoder: -inf where a token is not part of the instruction."""
        scores = torch.full_like(fit, float("-inf"))
        words = []
        for sample, prompt in enumerate(self._prompts(input_ids, valid, of)):
            length = len(squeeze(prompt.instruction))
            said = [max(start, 0) < min(end, length) for start, end in prompt.spans]
            places = torch.tensor(
                [p for p, s in zip(prompt.places, said, strict=True) if s], dtype=torch.long, device=fit.device
            )
            scores[sample, places] = fit[sample, places]
            found = scores[sample, torch.tensor(prompt.places, dtype=torch.long, device=fit.device)].tolist()
            words.append([(self.tokenizer.decode([i]), c) for i, c in zip(prompt.ids, found, strict=True)])
        return scores, words

    def fit(self, input_ids: Tensor, valid: Tensor, patches: Tensor, of: Of | None = None) -> Tensor:
        """Cosine "b v" of every patch (after the tower's last norm, "b v d") with its prompt's instruction as a whole,
        mean over the chunks of a long one."""
        joint = self.encoder.project(patches)
        texts = [prompt.instruction for prompt in self._prompts(input_ids, valid, of)]
        different = list(dict.fromkeys(texts))
        embedded = dict(zip(different, self.encoder.embed(different), strict=True))
        fits = [
            torch.cosine_similarity(patch[:, None].float(), embedded[text][None].float(), dim=-1).mean(1)
            for patch, text in zip(joint, texts, strict=True)
        ]
        return torch.stack(fits)

    def _prompts(self, input_ids: Tensor, valid: Tensor, of: Of | None) -> list[Prompt]:
        numbers, batch = of or (range(len(input_ids)), len(input_ids))
        rows = zip(numbers, input_ids.tolist(), valid.tolist(), strict=True)
        return [self._read(number, batch, row, real) for number, row, real in rows]

    def _read(self, sample: int, batch: int, row: list[int], real: list[bool]) -> Prompt:
        """The text tokens of one prompt and the letters of the instruction that each one spells.

        Where the instruction does not occur in the decoded prompt (unknown words, literal special tokens, letters that
        the tokenizer normalises), its own tokens are looked up in the prompt's. A token that is not part of it spells
        nothing, and is never relevant.
        """
        own = [(i, t) for i, (t, v) in enumerate(zip(row, real, strict=True)) if v and t != self.image_token_id]
        keep = [(i, t) for i, t in own if t not in self.ignored]
        text, spans = self._spell([t for _, t in keep])
        instruction = self._instruction(sample, batch, text)
        shift = squeeze(text).rfind(squeeze(instruction))
        if shift >= 0:
            spans = [(start - shift, end - shift) for start, end in spans]
        else:
            wanted, letters = self._tokens(instruction)
            keep = [(i, t) for i, t in own if t not in self.ignored or t in wanted]
            spans = matched_spans([t for _, t in keep], wanted, letters)
            if not any(start < end for start, end in spans):
                raise ValueError(
                    f"instruction {instruction!r} does not occur in prompt {sample} of the batch: {text!r}; give the part "
                    "of each prompt that is the question"
                )
        return Prompt([i for i, _ in keep], [t for _, t in keep], spans, instruction)

    def _spell(self, ids: list[int]) -> tuple[str, list[Span]]:
        """The text of some tokens and the characters that each one adds to it, whatever the tokenizer."""
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again, spans = self._tokens(text)
        return text, spans if again == ids and self.tokenizer.is_fast else self._spell_by_prefixes(ids)

    def _tokens(self, text: str) -> tuple[list[int], list[Span]]:
        """The tokens of a text and the letters of it that each one spells."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        ids = encoded["input_ids"]
        if self.tokenizer.is_fast:
            spans = squeezed_spans(text, encoded["offset_mapping"])
            # A space that a tokenizer puts before a text has the first letter's offsets: it spells nothing.
            if len(ids) > 1 and spans[0] == spans[1] and not self.tokenizer.decode(ids[:1]).strip():
                spans[0] = (0, 0)
            return ids, spans
        place = letters_of(squeeze(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)), text)
        found = [[place[i] for i in range(*span) if i in place] for span in self._spell_by_prefixes(ids)]
        return ids, [(min(letters), max(letters) + 1) if letters else (0, 0) for letters in found]

    def _spell_by_prefixes(self, ids: list[int]) -> list[Span]:
        """The letters that each token adds to the text of those before it; a part of a letter spells that letter."""
        spans, before = [], 0
        for count in range(1, len(ids) + 1):
            prefix = self.tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
            whole = prefix.rstrip("\ufffd")
            end = max(before, len(squeeze(whole)))
            spans.append((before, end + (whole != prefix)))
            before = end
        return [(start, min(end, before)) for start, end in spans]

    def _instruction(self, sample: int, batch: int, text: str) -> str:
        instruction = text
        if self.instructions is not None:
            if batch % len(self.instructions):
                raise ValueError(
                    f"{len(self.instructions)} instructions for {batch} prompts; give one, or one for each"
                )
            # Beam search and several return sequences repeat every sample in place.
            instruction = self.instructions[sample * len(self.instructions) // batch]
        return instruction


def matched_spans(ids: list[int], wanted: list[int], letters: list[Span]) -> list[Span]:
    """For every token of a prompt, the letters of an instruction that it spells, (0, 0) for none.

    wanted, letters  the instruction's own tokens, and the letters of each
    Tokens that differ between two equal ones (a first token that another stands before) share their letters evenly. Where
    fewer than half of the tokens are equal, it is another text: none spells any.
    """
    # Backwards, so that of several occurrences the last is found: what a template says before the question is no question.
    ids, wanted, letters = ids[::-1], wanted[::-1], letters[::-1]
    spans: list[Span] = [(0, 0)] * len(ids)
    core = difflib.SequenceMatcher(None, ids, wanted, autojunk=False).find_longest_match()
    first = max(0, core.a - core.b)
    part = ids[first : core.a - core.b + len(wanted)] if core.size else []
    matcher = difflib.SequenceMatcher(None, part, wanted, autojunk=False)
    if 2 * sum(block.size for block in matcher.get_matching_blocks()) < len(wanted):
        return spans
    for kind, start, stop, low, high in matcher.get_opcodes():
        if kind == "equal":
            spans[first + start : first + stop] = letters[low:high]
        elif kind == "replace":
            begin, end, count = letters[high - 1][0], letters[low][1], stop - start
            for number in range(count):
                most = -(-(number + 1) * (end - begin) // count)  # rounded up: a part of a letter spells that letter
                spans[first + start + number] = end - most, end - number * (end - begin) // count
    return spans[::-1]
