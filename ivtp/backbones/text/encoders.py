"""CLIP text encoders, from transformers or open_clip."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ivtp.backbones.family import layers_of
from ivtp.core.flops import Layers
from ivtp.core.guidance import Span, Spelled, squeeze, squeezed_spans


class TextEncoder(Protocol):
    """The text half of the CLIP that the vision tower comes from; `sizes`, `context` and `joint` are for its cost."""

    sizes: Layers
    context: int
    joint: int

    def encode(self, texts: Sequence[str]) -> list[Spelled]:
        """Eq. 5: features of every token of each text in the joint space, without begin and end marks."""
        ...

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Feature of each text as a whole in the joint space, one row per chunk of the context "m d"."""
        ...

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, begin and end mark included, as `cost` counts them."""
        ...

    def project(self, cls: Tensor) -> Tensor:
        """Project the visual CLS "b d", after the tower's last norm, into the joint space."""
        ...


class ChunkedText:
    """The part that the text encoders of both libraries share: texts longer than the context.

    They go through in chunks, each with its own marks (the paper does not say; ours). All chunks are one batch: the encoder
    is causal, so padding behind is harmless.
    """

    context: int
    marks: tuple[int, int]

    def encode(self, texts: Sequence[str]) -> list[Spelled]:
        ids, spans = self._tokens(texts)
        return [Spelled(s, f) for s, f in zip(spans, self._chunked(ids), strict=True)]

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        return self._chunked(self._tokens(texts)[0], pooled=True)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) + 2 for ids in self._tokens(texts)[0]]

    def _tokens(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[Span]]]:
        """Tokens of each text, without marks, and the letters that each one spells."""
        raise NotImplementedError

    def _features(self, rows: list[list[int]]) -> Tensor:
        """Features "m s d" in the joint space of the tokens of each row, padded on the right."""
        raise NotImplementedError

    def _chunked(self, texts: Sequence[list[int]], pooled: bool = False) -> list[Tensor]:
        """Features of every token of every text. `pooled`: of the end mark of every chunk instead, which represents it."""
        length = self.context - 2
        rows, owner = [], []
        for number, ids in enumerate(texts):
            for start in range(0, max(len(ids), 1), length):  # a text of no tokens is one chunk of two marks
                rows.append([self.marks[0], *ids[start : start + length], self.marks[1]])
                owner.append(number)
        chunks: list[list[Tensor]] = [[] for _ in texts]
        for number, row, hidden in zip(owner, rows, self._features(rows), strict=True):
            end = len(row) - 1
            chunks[number].append(hidden[end : end + 1] if pooled else hidden[1:end])
        return [torch.cat(parts) for parts in chunks]


class TransformersText(ChunkedText):
    """`CLIPTextModelWithProjection` and the visual projection of the same CLIP checkpoint."""

    def __init__(self, model: Any, tokenizer: Any, visual_projection: Tensor) -> None:
        self.model, self.tokenizer, self.visual_projection = model, tokenizer, visual_projection
        self.sizes, self.context = layers_of(model.config), model.config.max_position_embeddings
        self.marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.joint, self.vision_width = visual_projection.shape

    def _tokens(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[Span]]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        spans = [squeezed_spans(text, o) for text, o in zip(texts, encoded["offset_mapping"], strict=True)]
        return encoded["input_ids"], spans

    def _features(self, rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        padded = [row + [row[-1]] * (longest - len(row)) for row in rows]
        hidden = self.model.text_model(input_ids=torch.tensor(padded, device=self.model.device)).last_hidden_state
        return self.model.text_projection(hidden)

    def project(self, cls: Tensor) -> Tensor:
        return cls @ self.visual_projection.T.to(cls)


class OpenClipText(ChunkedText):
    """The text tower of an open_clip CLIP, alone or within it, and its visual projection (default: the whole CLIP's own)."""

    def __init__(self, model: Any, tokenizer: Any, visual_projection: Tensor | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.visual_projection: Tensor = model.visual.proj if visual_projection is None else visual_projection
        if getattr(model, "attn_mask", None) is None or not hasattr(tokenizer, "byte_decoder"):
            raise ValueError(
                "this open_clip model has no causal text tower with CLIP's own tokenizer; use another CLIP"
            )
        blocks = model.transformer.resblocks
        width, heads, ffn = blocks[0].attn.embed_dim, blocks[0].attn.num_heads, blocks[0].mlp.c_fc.out_features
        self.sizes, self.context = (
            Layers(len(blocks), width, ffn, heads, heads, width // heads, 2),
            model.context_length,
        )
        self.marks = (tokenizer.sot_token_id, tokenizer.eot_token_id)
        self.vision_width, self.joint = self.visual_projection.shape

    def _tokens(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[Span]]]:
        ids = [self.tokenizer.encode(text) for text in texts]
        return ids, [self._spans(text, tokens) for text, tokens in zip(texts, ids, strict=True)]

    def _features(self, rows: list[list[int]]) -> Tensor:
        model, n = self.model, max(map(len, rows))
        padded = torch.tensor([row + [0] * (n - len(row)) for row in rows], device=model.positional_embedding.device)
        # Like its encode_text, which reads a whole context only and returns the end mark alone.
        x = model.token_embedding(padded) + model.positional_embedding[:n]
        x = x.to(model.transformer.get_cast_dtype())
        hidden = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n, :n]))
        projection = model.text_projection
        return projection(hidden) if isinstance(projection, nn.Linear) else hidden @ projection

    def project(self, cls: Tensor) -> Tensor:
        return cls @ self.visual_projection.to(cls)

    def _spans(self, text: str, ids: Sequence[int]) -> list[Span]:
        """Letters of the text that each token spells.

        open_clip's tokenizer has no offsets, but its tokens are bytes of the cleaned text, whose letters are matched with
        the text's own. A token of letters that cleaning added spells nothing (an empty span).
        """
        pieces = [self.tokenizer.decoder[token].removesuffix("</w>") for token in ids]
        raw = [bytes(self.tokenizer.byte_decoder[c] for c in piece) for piece in pieces]
        cleaned = b"".join(raw).decode("utf-8", errors="replace")
        letter_of = [i for i, letter in enumerate(cleaned) for _ in letter.encode()]
        place, at, spans = letters_of(cleaned, text), 0, []
        for piece in raw:
            spans.append(span_of(place[i] for i in letter_of[at : at + len(piece)] if i in place))
            at += len(piece)
        return spans


def span_of(letters: Iterable[int]) -> Span:
    """Span from the first to the last of some letters; (0, 0) for none."""
    letters = list(letters)
    return (min(letters), max(letters) + 1) if letters else (0, 0)


def letters_of(spelled: str, text: str) -> dict[int, int]:
    """Index in the squeezed text of each letter that tokens spell; letters that cleaning added have none.

    Ligatures and wide letters are spelled out: they are shared evenly.
    """
    lowered = [(low, i) for i, letter in enumerate(squeeze(text)) for low in letter.lower()]
    place: dict[int, int] = {}
    matcher = difflib.SequenceMatcher(None, spelled, [low for low, _ in lowered], autojunk=False)
    for kind, start, stop, first, last in matcher.get_opcodes():
        if kind in ("equal", "replace"):
            step = (last - first) / (stop - start)
            place.update((i, lowered[first + int((i - start) * step)][1]) for i in range(start, stop))
    return place
