"""Eq. 7 between two real tokenizers: CLIP's byte pairs and a Llama-type SentencePiece, as the assets of scenes2 have them.

Every label word and some hundred questions, against a computation from the letters of each tokenizer's own pieces.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from conftest import shake

from ivtp.backbones.text.encoders import TransformersText
from ivtp.backbones.text.token_relevance import Guide
from ivtp.data.scenes2 import assets, make_scene
from ivtp.data.scenes2.words import terms, vocabulary

BEFORE, AFTER = "USER: <image>\n", " ASSISTANT:"


@cache
def tokenizer(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.FOLDER / name)


@cache
def encoder() -> TransformersText:
    """CLIP's tokenizer with a small random text tower: every token has features of its own."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    words = tokenizer("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = CLIPTextConfig(vocab_size=len(words), projection_dim=13, **sizes, **marks)
    return TransformersText(shake(CLIPTextModelWithProjection(config), 3), words, torch.randn(13, 5))


def ranges(pieces: list[str]) -> list[range]:
    """Letters that each piece spells, in their order; a piece of nothing but a space spells none."""
    found, at = [], 0
    for piece in pieces:
        letters = len(piece.removesuffix("</w>").replace("▁", "").replace("<0x0A>", ""))
        found.append(range(at, at + letters))
        at += letters
    return found


def of_question(text: str) -> tuple[list[int], list[range]]:
    """Ids of a prompt, and which letters of the question each token spells (before it: negative)."""
    words = tokenizer("llama")
    head, tail = words(BEFORE)["input_ids"], words(text + AFTER, add_special_tokens=False)["input_ids"]
    return head + tail, [range(0)] * len(head) + ranges(words.convert_ids_to_tokens(tail))


def texts(kind: str) -> list[str]:
    if kind == "label words":
        return sorted({*vocabulary(), *terms()} - {"?", "$"})
    return [question.text for index in range(56) for question in make_scene("test", index)[1]]


@pytest.mark.parametrize("kind", ["label words", "questions"])
def test_each_piece_of_the_llm_has_the_mean_relevance_of_the_clip_tokens_that_share_its_letters(kind):
    """Wrong here means that the pseudo CLS is made of other words than those that CLIP finds in the image."""
    asked = list(dict.fromkeys(texts(kind)))
    assert len(asked) > (800 if kind == "label words" else 300)
    prompts = [of_question(text) for text in asked]
    length = max(len(ids) for ids, _ in prompts)
    pad = tokenizer("llama").pad_token_id
    ids = torch.tensor([[pad] * (length - len(row)) + row for row, _ in prompts])
    valid = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row, _ in prompts])
    cls = torch.randn(len(asked), 5)
    guide = Guide(tokenizer("llama"), encoder(), tokenizer("llama").image_token_id)
    guide.instructions = asked
    scores, _ = guide(ids, valid, cls)

    shares, expected = Counter(), torch.full_like(scores, float("-inf"))
    spelled_by_clip = encoder().encode(asked)
    for number, (text, (row, spelled), clip) in enumerate(zip(asked, prompts, spelled_by_clip, strict=True)):
        pieces = ranges(tokenizer("clip").tokenize(text))
        assert [range(*span) for span in clip.spans] == pieces, text
        direction = encoder().project(cls[number])
        cosine = clip.features @ direction / clip.features.norm(dim=1) / direction.norm()
        letters = sum(map(len, pieces))
        for place, own in enumerate(spelled, start=length - len(row)):
            sharing = [i for i, piece in enumerate(pieces) if set(own) & set(piece) and own.start < letters]
            if sharing:
                expected[number, place] = cosine[sharing].mean()
                shares["several for one"] += len(sharing) > 1
                shares["part of one"] += len(sharing) == 1 and len(own) < len(pieces[sharing[0]])
                shares["the same"] += own in pieces
    wrong = ~scores.isclose(expected, rtol=0, atol=1e-5).all(1)
    assert not wrong.any(), [text for text, bad in zip(asked, wrong.tolist(), strict=True) if bad][:5]
    assert all(shares[case] >= 5 for case in ("several for one", "part of one", "the same")), shares
