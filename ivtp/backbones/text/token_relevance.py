"""Relevance of a prompt's tokens to its image: CLIP's tokens aligned with those of the language model (IVTP, Eq. 5–7)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivtp.backbones.text.encoders import TextEncoder, letters_of, span_of
from ivtp.core.guidance import Span, align, relevance, squeeze, squeezed_spans

Of = tuple[Sequence[int], int]
"""Numbers of some prompts in a larger batch, and the size of that batch."""
Words = list[tuple[str, float]]
"""Text tokens of a prompt, each with its relevance."""


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

    encoder       None where CLIP is not read
    instructions  the part of each prompt that CLIP reads (the question); default: all of the prompt's text
    """

    def __init__(self, tokenizer: Any, encoder: TextEncoder | None, image_token_id: int) -> None:
        self.tokenizer, self.image_token_id = tokenizer, image_token_id
        self.encoder: Any = encoder
        marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        # A word without a token of its own is a word; begin and end marks, padding and roles are not.
        self.ignored = {image_token_id, *tokenizer.all_special_ids} - ({tokenizer.unk_token_id} - marks)
        self.instructions: Sequence[str] | None = None
        self._texts: dict[int, str] = {}

    def __call__(
        self, input_ids: Tensor, valid: Tensor, cls: Tensor, of: Of | None = None
    ) -> tuple[Tensor, list[Words]]:
        """Relevance "b n" (-inf where a token is not part of the instruction), and per sample (token, relevance).

        of  numbers of these prompts in a larger batch, and its size; here and below
        """
        joint = self.encoder.project(cls)
        prompts = self._prompts(input_ids, valid, of)
        texts = list(dict.fromkeys(prompt.instruction for prompt in prompts))
        spelled = dict(zip(texts, self.encoder.encode(texts), strict=True))
        fits = [relevance(cls, spelled[p.instruction].features) for cls, p in zip(joint, prompts, strict=True)]
        # Fetched at once and aligned here: on a GPU every small tensor on the way there would wait for it.
        here = torch.cat(fits).cpu().split([len(fit) for fit in fits])
        scores = torch.full(input_ids.shape, float("-inf"))
        for row, prompt, fit in zip(scores, prompts, here, strict=True):
            row[prompt.places] = align(fit, spelled[prompt.instruction].spans, prompt.spans)
        return scores.to(input_ids.device), self._words(prompts, scores)

    def spelled_out(
        self, input_ids: Tensor, valid: Tensor, fit: Tensor, of: Of | None = None
    ) -> tuple[Tensor, list[Words]]:
        """Relevance "b n" from a fit "b n" that needs no text encoder, with the words as in a call of the guide."""
        here, prompts = fit.cpu(), self._prompts(input_ids, valid, of)
        scores = torch.full_like(here, float("-inf"))
        for sample, prompt in enumerate(prompts):
            length = len(squeeze(prompt.instruction))
            inside = [max(start, 0) < min(end, length) for start, end in prompt.spans]
            places = [place for place, spells in zip(prompt.places, inside, strict=True) if spells]
            scores[sample, places] = here[sample, places]
        return scores.to(fit.device), self._words(prompts, scores)

    def _words(self, prompts: Sequence[Prompt], scores: Tensor) -> list[Words]:
        """Each text token of each prompt with its relevance."""
        return [
            [
                (self._text_of(token), value)
                for token, value in zip(prompt.ids, row[prompt.places].tolist(), strict=True)
            ]
            for prompt, row in zip(prompts, scores, strict=True)
        ]

    def _text_of(self, token: int) -> str:
        """Text of one token, looked up once."""
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        return self._texts[token]

    def fit(self, input_ids: Tensor, valid: Tensor, patches: Tensor, of: Of | None = None) -> Tensor:
        """Cosine "b v" of every patch (after the tower's last norm, "b v d") with the whole instruction of its prompt, mean
        over the chunks of a long instruction."""
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
        # Image tokens are padding here: there are thousands of them.
        rows = input_ids.masked_fill(~valid, self.image_token_id).cpu()
        return [self._read(number, batch, row) for number, row in zip(numbers, rows, strict=True)]

    def _read(self, sample: int, batch: int, row: Tensor) -> Prompt:
        """The text tokens of one prompt and the letters of the instruction that each one spells.

        Where the instruction does not occur in the decoded prompt (unknown words, literal special tokens, letters that
        the tokenizer normalises), its own tokens are looked up in the prompt's. A token that is not part of it spells
        nothing, and is never relevant.
        """
        places = (row != self.image_token_id).nonzero()[:, 0]
        own = list(zip(places.tolist(), row[places].tolist(), strict=True))
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
        """Text of some tokens and the characters that each one adds to it, for any tokenizer."""
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again, spans = self._tokens(text)
        return text, spans if again == ids and self.tokenizer.is_fast else self._spell_by_prefixes(ids)

    def _tokens(self, text: str) -> tuple[list[int], list[Span]]:
        """Tokens of a text and the letters that each one spells."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        ids = encoded["input_ids"]
        if self.tokenizer.is_fast:
            spans = squeezed_spans(text, encoded["offset_mapping"])
            # A space that a tokenizer puts before a text has the first letter's offsets: it spells nothing.
            if len(ids) > 1 and spans[0] == spans[1] and not self.tokenizer.decode(ids[:1]).strip():
                spans[0] = (0, 0)
            return ids, spans
        place = letters_of(squeeze(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)), text)
        return ids, [span_of(place[i] for i in range(*span) if i in place) for span in self._spell_by_prefixes(ids)]

    def _spell_by_prefixes(self, ids: list[int]) -> list[Span]:
        """Letters that each token adds to the text of those before it; a part of a letter spells that letter."""
        spans, before = [], 0
        for count in range(1, len(ids) + 1):
            prefix = self.tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
            whole = prefix.rstrip("\ufffd")
            end = max(before, len(squeeze(whole)))
            spans.append((before, end + (whole != prefix)))
            before = end
        return [(start, min(end, before)) for start, end in spans]

    def _instruction(self, sample: int, batch: int, text: str) -> str:
        if self.instructions is None:
            return text
        if batch % len(self.instructions):
            raise ValueError(f"{len(self.instructions)} instructions for {batch} prompts; give one, or one for each")
        # Beam search and several return sequences repeat every sample in place.
        return self.instructions[sample * len(self.instructions) // batch]


def matched_spans(ids: list[int], wanted: list[int], letters: list[Span]) -> list[Span]:
    """Letters of an instruction that each token of a prompt spells, (0, 0) for none.

    wanted, letters  the instruction's own tokens, and the letters of each
    Tokens that differ between two equal ones (a first token that another stands before) share their letters evenly. Where
    fewer than half of the tokens are equal, it is another text: none spells any.
    """
    # Backwards, so that the last of several occurrences counts: text of a template before the question is no question.
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
