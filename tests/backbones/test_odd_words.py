"""Guidance with words, letters and marks that an LLM's tokenizer has no token for (Eq. 7): nothing raises, all that can be
aligned is."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, inputs, make_llava, make_text_encoder, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import ivtp
from ivtp.backbones.text.token_relevance import Guide
from ivtp.core.guidance import Spelled, squeeze

PIECES = [
    "what",
    "Color",
    "zebra",
    "é",
    "e\u0301",
    "ﬁne",
    "①",
    "🙂",
    "猫は",
    "</s>",
    "<unk>",
    "?",
    "3.14",
    "İ",
    "x_2",
    "don't",
]
TEMPLATES = ["is the thing {} of the cube", "{}", "{} of\nthe cube", "</s> the\n{}"]


def pieces_tokenizer(legacy: bool):
    """As Llama's: pieces with a mark for the space before them, bytes for what has none, letters normalised (NFKC)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = [
        *"▁abcdefghijklmnopqrstuvwxyzUSERAITN:.?'é",
        "▁w",
        "▁wh",
        "▁wha",
        "▁what",
        "th",
        "the",
        "▁the",
        "is",
        "▁is",
    ]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *bytes_, *letters])}
    merges = [
        ("▁", "w"),
        ("▁w", "h"),
        ("▁wh", "a"),
        ("▁wha", "t"),
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("i", "s"),
        ("▁", "is"),
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    if legacy:  # the mark is a letter of the text: also behind every special token
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), *spaces])
    else:
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(mark, normalized=False, special=True) for mark in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Slow:
    """A tokenizer without offsets: a fast one behind the face of transformers' slow ones."""

    is_fast = False

    def __init__(self, fast) -> None:
        self.fast = fast

    def __getattr__(self, name):
        return getattr(self.fast, name)

    def __call__(self, text, add_special_tokens, return_offsets_mapping):
        assert not return_offsets_mapping
        return {"input_ids": self.fast(text, add_special_tokens=add_special_tokens)["input_ids"]}


TOKENIZERS = {
    "words": word_tokenizer(),
    "bytes": byte_tokenizer(),
    "pieces": pieces_tokenizer(False),
    "legacy": pieces_tokenizer(True),
}


class Letters:
    """A text encoder with one token per letter, whose relevance is its own."""

    def encode(self, texts):
        return [
            Spelled(
                [(i, i + 1) for i in range(len(squeeze(text)))], torch.stack([*self.features(text), torch.ones(2)])[:-1]
            )
            for text in texts
        ]

    def features(self, text):
        return [torch.tensor([1.0, (31 * i + ord(letter)) % 17 / 17]) for i, letter in enumerate(squeeze(text))]

    def project(self, cls):
        return cls


def guided(tokenizer, prompt, question):
    guide = Guide(tokenizer, Letters(), image_token_id=-1)
    guide.instructions = [question]
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    cls = torch.tensor([[1.0, 0.0]])
    scores, words = guide(ids, torch.ones_like(ids, dtype=torch.bool), cls)
    return ids[0].tolist(), scores[0], words[0], cls[0]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40)
@given(
    question=st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map(" ".join),
    template=st.sampled_from(TEMPLATES),
)
def test_every_token_has_the_relevance_of_the_letters_that_it_spells(kind, question, template):
    """Beside the offsets that the tokenizer gives for the whole prompt, which the guide is not told."""
    tokenizer, prompt = TOKENIZERS[kind], template.format(question)
    ids, scores, words, cls = guided(tokenizer, prompt, question)
    begin = template.index("{}")
    before = list(itertools.accumulate((not letter.isspace() for letter in question), initial=0))
    cosines = [float(torch.cosine_similarity(cls, feature, dim=0)) for feature in Letters().features(question)]
    offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(words) <= len(ids) == len(offsets)
    if tokenizer.decode(ids[:1]) == "":  # a space put before the text, with the first letter's offsets
        offsets[0] = (0, 0)
    for (start, end), score in zip(offsets, scores.tolist(), strict=True):
        first, last = max(start - begin, 0), min(end - begin, len(question))
        own = cosines[before[first] : before[last]] if first < last else []
        if own:
            assert score == pytest.approx(sum(own) / len(own), abs=1e-5), (question, prompt)
        else:
            assert score == float("-inf")


@pytest.mark.parametrize("question", ["what is the é", "what 🙂 is", "the e\u0301 thing", "①① is"])
def test_without_offsets_the_same(question):
    """Letters are those that a token adds to the text before it."""
    fast, prompt = TOKENIZERS["pieces"], f"is it {question} of the"
    expected = guided(fast, prompt, question)[1]
    slow = Slow(fast)
    guide = Guide(slow, Letters(), image_token_id=-1)
    guide.instructions = [question]
    ids = torch.tensor([fast(prompt, add_special_tokens=False)["input_ids"]])
    found = guide(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([[1.0, 0.0]]))[0][0]
    assert torch.equal(found > float("-inf"), expected > float("-inf"))


def test_the_last_of_several_occurrences_is_the_question():
    ids, scores, _, _ = guided(TOKENIZERS["words"], "is zebra red ? is zebra red ?", "is zebra red ?")
    assert len(ids) == 8
    assert (scores > float("-inf")).tolist() == [False] * 4 + [True] * 4


def test_an_instruction_that_is_not_in_the_prompt_is_refused():
    with pytest.raises(ValueError, match="'how many' does not occur in prompt 0"):
        guided(TOKENIZERS["words"], "what is the thing ?", "how many")


@pytest.fixture(scope="module")
def model():
    tokenizer = word_tokenizer()
    return ivtp.load_model(make_llava(), SimpleNamespace(tokenizer=tokenizer), make_text_encoder())[0], tokenizer


def test_unknown_words_take_part_in_the_pseudo_cls(model):
    """As <unk>, with the relevance that CLIP has for the word itself."""
    llava, tokenizer = model
    question = "is zebra thing small ?"
    batch = inputs(("is the thing small ?",))
    batch["input_ids"] = batch["input_ids"].clone()
    place = int((batch["input_ids"][0] == tokenizer.convert_tokens_to_ids("the")).int().argmax())
    batch["input_ids"][0, place] = tokenizer.unk_token_id
    with ivtp.prune(llava, "ivtp", keep=5, tau=-1.0, instruction=question) as run:
        llava(**batch)
    assert [word for word, _ in run.trace.words[0]] == ["is", "<unk>", "thing", "small", "?"]
    assert all(relevance >= -1 for _, relevance in run.trace.words[0])


@pytest.mark.parametrize("name", ["ivtp", "cdpruner"])
@pytest.mark.parametrize("instruction", [None, ""])
def test_a_prompt_without_text_is_guided_by_the_image_alone(model, name, instruction):
    """Nothing of it is relevant, so that the pseudo CLS is the visual CLS (Eq. 8)."""
    llava, _ = model
    batch = inputs(("is the thing small ?",))
    pixels = batch["pixel_values"]
    bare = torch.tensor([[1, *[4] * 25]])
    given = {"input_ids": bare, "attention_mask": torch.ones_like(bare), "pixel_values": pixels}
    with ivtp.prune(llava, name, keep=5, instruction=instruction) as run:
        guided = llava(**given).logits
    assert run.trace.kept.position.shape == (1, 5)
    if name == "ivtp":
        assert run.trace.words == [[]]
        with ivtp.prune(llava, name, keep=5, reference="visual_cls"):
            assert torch.equal(llava(**given).logits, guided)
