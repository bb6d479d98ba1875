"""The components of the instruction (Table 6), from their definitions, word by word."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXTS, inputs, llava, plan_of

import ivtp
from ivtp.core.guidance import WORDS, pseudo_cls

NOT = float("-inf")


def by_hand(x, relevance, tau, fallback, words):
    total, weights = torch.zeros_like(x[0]), 0.0
    for vector, c in zip(x, relevance.tolist(), strict=True):
        if c == NOT:
            continue
        weight = {"all": 1.0, "te": max(c, 0.0)}.get(words, float(c >= tau))
        total, weights = total + weight * vector, weights + weight
    return total / weights if weights else fallback


@pytest.mark.parametrize("words", WORDS)
def test_the_pseudo_cls_is_what_its_words_say(words):
    x, fallback = torch.randn(3, 7, 5), torch.randn(3, 5)
    relevance = torch.tensor([[NOT, 0.3, -0.2, 0.1, NOT, 0.2, 0.0], [NOT, -0.3, -0.1, NOT, NOT, NOT, -0.5], [NOT] * 7])
    found = pseudo_cls(x, relevance, 0.2, fallback, words)
    for sample in range(3):
        torch.testing.assert_close(found[sample], by_hand(x[sample], relevance[sample], 0.2, fallback[sample], words))


def test_no_threshold_lets_in_what_is_no_word():
    x, fallback = torch.randn(1, 2, 5), torch.randn(1, 5)
    assert torch.equal(pseudo_cls(x, torch.tensor([[NOT, 0.1]]), -1.0, fallback)[0], x[0, 1])


def appended(plan):
    """The reference that is appended, caught where the language model gets it."""
    from unittest.mock import patch

    from ivtp.core.tokens import Tokens

    caught, append = [], Tokens.append
    spy = patch.object(Tokens, "append", lambda self, x: (caught.append(x), append(self, x))[1])
    with spy, ivtp.prune(llava(), plan, instruction=list(TEXTS)) as run:
        llava()(**inputs())
    return caught[0], run.trace.words


def embedded(text):
    from conftest import word_tokenizer

    ids = torch.tensor(word_tokenizer()(text, add_special_tokens=False)["input_ids"])
    return llava().model.get_input_embeddings()(ids)


def test_all_words_need_no_text_encoder_and_are_the_mean_of_the_question():
    from unittest.mock import patch

    from ivtp.backbones.text.encoders import TransformersText

    with patch.object(TransformersText, "encode", side_effect=AssertionError("the text encoder ran")):
        found, words = appended(plan_of("ivtp", llava(), words="all"))
    for vector, text in zip(found, TEXTS, strict=True):
        torch.testing.assert_close(vector, embedded(text).mean(0))
    assert [len(w) for w in words] == [len(text.split()) for text in TEXTS]


def test_a_threshold_without_text_encoder_compares_with_the_projected_visual_cls():
    visual, _ = appended(plan_of("ivtp", llava(), reference="visual_cls"))
    found, words = appended(plan_of("ivtp", llava(), words="rt", tau=0.05))
    for vector, cls, text, said in zip(found, visual, TEXTS, words, strict=True):
        x = embedded(text)
        fit = torch.cosine_similarity(x, cls[None], dim=1)
        expected = x[fit >= 0.05].mean(0) if bool((fit >= 0.05).any()) else cls
        torch.testing.assert_close(vector, expected)
        torch.testing.assert_close(torch.tensor([c for _, c in said]), fit)


def test_only_what_reads_the_text_encoder_pays_for_it():
    from ivtp.core.flops import cost

    shape = ivtp.shape_of(llava())
    spent = {words: cost(shape, plan_of("ivtp", llava(), words=words)).text_encoder for words in WORDS}
    assert spent["te"] == spent["te_rt"] > spent["rt"] == spent["all"] > 0


@pytest.mark.parametrize(
    "settings", [{"words": "te_r"}, {"split": 1.1}, {"split": 0.5, "vision_keep": 7}, {"language_score": "x"}]
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        plan_of("ivtp", llava(), **settings)


def test_the_split_moves_the_reduction_between_the_sites():
    def leaves_vit(split):
        return plan_of("ivtp", llava(), keep=5, split=split).vision.schedule[-1].keep

    assert [leaves_vit(s) for s in (0.0, 0.5, 1.0)] == [25, round((25 * 5) ** 0.5), 5]
