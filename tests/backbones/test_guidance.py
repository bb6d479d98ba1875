"""Instruction guidance (Eq. 5–8): what the text encoders say, and whose letters it is said about."""

import itertools
from types import SimpleNamespace

import open_clip
import pytest
import torch
from conftest import TEXTS, byte_tokenizer, inputs, llava, make_llava, make_text_encoder, shake, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import ivtp
from ivtp.backbones.text.encoders import OpenClipText
from ivtp.backbones.text.token_relevance import Guide
from ivtp.core.guidance import align, pseudo_cls, relevance, squeeze, squeezed_spans

UNICODE = [
    "don't they've it's we'll I'm",
    "Größe naïve ﬁne Straße",
    "猫は何色ですか？ 犬 also",
    "🙂 what 👩‍👩‍👧 is 🏳️‍🌈 this?",
    "line one\n\n\tline   two ",
    "İstanbul ISPARTA what?",
    "3.14159 + x_2 != 7%",
]


def make_open_clip(context=11):
    config = {
        "embed_dim": 13,
        "vision_cfg": {"layers": 2, "width": 24, "head_width": 8, "image_size": 35, "patch_size": 7},
        "text_cfg": {"context_length": context, "vocab_size": 49408, "width": 20, "heads": 5, "layers": 3},
    }
    return shake(open_clip.model.CLIP(**config), 9)


@pytest.fixture(scope="module")
def open_clip_text():
    return OpenClipText(make_open_clip(), open_clip.tokenizer.SimpleTokenizer())


def test_transformers_features_are_the_models_own_at_every_token():
    """What CLIP itself says: its text embedding at the end mark of the text up to that token, in any batch."""
    encoder = make_text_encoder(context=40)
    spelled = encoder.encode(list(TEXTS))
    end = encoder.tokenizer.eos_token_id
    for text, found in zip(TEXTS, spelled, strict=True):
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(found.spans) == len(found.features) == len(ids)
        whole = torch.tensor([[encoder.tokenizer.bos_token_id, *ids, end]])
        out = encoder.model(input_ids=whole)
        states = encoder.model.text_projection(out.last_hidden_state)[0]
        torch.testing.assert_close(found.features, states[1:-1])
        torch.testing.assert_close(states[-1:], out.text_embeds)


def test_the_end_mark_feature_is_text_embeds():
    """The projection is the checkpoint's: compared where transformers itself pools."""
    encoder = make_text_encoder(context=40)
    start, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    ids = encoder.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    features = encoder._features([[start, *ids, end], [start, end]])
    expected = encoder.model(input_ids=torch.tensor([[start, *ids, end]])).text_embeds
    torch.testing.assert_close(features[0, len(ids) + 1][None], expected)
    torch.testing.assert_close(features[1, 1][None], encoder.model(input_ids=torch.tensor([[start, end]])).text_embeds)


@pytest.mark.parametrize("text", ["a", "what color is the ball", "is it a cat?"])
def test_open_clip_features_are_its_own(open_clip_text, text):
    """At the end mark, `encode_text` of the same model; for a text that fills the context, too."""
    tokenizer = open_clip_text.tokenizer
    ids = tokenizer.encode(text)
    row = [tokenizer.sot_token_id, *ids, tokenizer.eot_token_id]
    expected = open_clip_text.model.encode_text(tokenizer([text], context_length=11))
    torch.testing.assert_close(open_clip_text._features([row, row[:2]])[0, len(row) - 1][None], expected)
    cls = torch.randn(2, 24)
    torch.testing.assert_close(open_clip_text.project(cls), cls @ open_clip_text.model.visual.proj)


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_a_text_beyond_the_context_is_read_in_chunks(kind, open_clip_text):
    """Every chunk with marks of its own; nothing is truncated, and a short text beside it does not notice."""
    encoder = make_text_encoder(context=11) if kind == "transformers" else open_clip_text
    long, short = " ".join(TEXTS), "is it red"
    together, alone = encoder.encode([long, short]), encoder.encode([short])[0]
    assert len(together[0].features) > 2 * encoder.context
    assert len(together[0].features) == len(together[0].spans)
    assert together[0].spans[-1][1] == len(squeeze(long))
    torch.testing.assert_close(together[1].features, alone.features)
    ids = (
        encoder.tokenizer(long, add_special_tokens=False)["input_ids"]
        if kind == "transformers"
        else encoder.tokenizer.encode(long)
    )
    marks = (
        (encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id)
        if kind == "transformers"
        else (encoder.tokenizer.sot_token_id, encoder.tokenizer.eot_token_id)
    )
    second = encoder._features([[marks[0], *ids[9:18], marks[1]]])[0, 1:-1]
    torch.testing.assert_close(together[0].features[9:18], second)


@pytest.mark.parametrize("text", [*TEXTS, *UNICODE])
def test_open_clip_tokens_know_their_letters(open_clip_text, text):
    """Its tokenizer has no offsets: together the tokens spell every letter, in order, and each its own."""
    spans = open_clip_text.encode([text])[0].spans
    letters = squeeze(text)
    covered = sorted({i for start, end in spans for i in range(start, end)})
    assert covered == list(range(len(letters)))
    assert all(a <= b for (a, _), (b, end) in itertools.pairwise(spans) if end), "in reading order"
    for token, (start, end) in zip(open_clip_text.tokenizer.encode(text), spans, strict=True):
        piece = open_clip_text.tokenizer.decode([token]).strip()
        assert end > start
        if piece.isascii() and not set(letters[start:end]) & set("ﬁ？İ"):
            assert letters[start:end].lower() == piece.lower()


def test_a_text_of_nothing_but_cleaned_away_characters_spells_nothing(open_clip_text):
    assert open_clip_text.encode(["\u0007"])[0].features.shape[1] == 13


@given(
    st.lists(
        st.sampled_from(["red", "don't", "🙂", "猫", "é", "?", " ", "\n", "İ", "cube ", "ﬁ"]), min_size=1, max_size=9
    )
)
def test_squeezed_spans_count_letters_only(pieces):
    text = "".join(pieces)
    offsets, at = [], 0
    for piece in pieces:
        offsets.append((at, at + len(piece)))
        at += len(piece)
    for piece, (start, end) in zip(pieces, squeezed_spans(text, offsets), strict=True):
        assert squeeze(text)[start:end] == squeeze(piece)


@pytest.mark.parametrize("text", UNICODE)
@pytest.mark.parametrize("size", [258, 300, 420])
def test_llm_tokens_of_any_tokenizer_know_their_letters(text, size):
    """Byte-level BPE of any vocabulary: a token's span contains the letters it decodes to, in order, none left out."""
    tokenizer = byte_tokenizer(corpus=[*UNICODE * 3, *TEXTS], size=size)
    guide = Guide(tokenizer, None, -1)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled, spans = guide._spell(ids)
    letters = squeeze(spelled)
    assert letters == squeeze(text)
    for token, (start, end) in zip(ids, spans, strict=True):
        piece = squeeze(tokenizer.decode([token]))
        if "\ufffd" not in piece:
            assert letters[start:end] == piece
        else:
            assert end - start >= 1, "a part of a character spells that character"
    assert {i for start, end in spans for i in range(start, end)} == set(range(len(letters)))


def test_tokens_that_do_not_come_back_are_spelled_by_prefixes():
    """Ids that the tokenizer would not choose itself (a generated prompt, another merge): same letters."""
    tokenizer = byte_tokenizer(size=420)
    guide = Guide(tokenizer, None, -1)
    ids = [i for letter in "what color 🙂 is it" for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert ids != tokenizer("what color 🙂 is it", add_special_tokens=False)["input_ids"]
    text, spans = guide._spell(ids)
    assert squeeze(text) == squeeze("what color 🙂 is it")
    assert {i for start, end in spans for i in range(start, end)} == set(range(len(squeeze(text))))


@given(st.integers(0, 10_000))
def test_alignment_is_the_mean_over_shared_letters(seed):
    """Eq. 7, two random segmentations of the same letters, token by token."""
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 20, (1,), generator=g))

    def segments():
        ends = [i + 1 for i in range(n) if i == n - 1 or torch.rand(1, generator=g) < 0.5]
        return list(zip([0, *ends], ends, strict=False))

    clip, llm = segments(), [*segments(), (0, 0), (n + 3, n + 5), (-4, -1)]
    c = torch.randn(len(clip), generator=g)
    found = align(c, clip, llm)
    for target, actual in zip(llm, found.tolist(), strict=True):
        letters = set(range(*target))
        values = [float(v) for v, span in zip(c, clip, strict=True) if letters & set(range(*span))]
        assert actual == pytest.approx(sum(values) / len(values), abs=1e-6) if values else actual == float("-inf")


@given(st.integers(0, 10_000), st.sampled_from([-2.0, -0.3, 0.0, 0.2, 2.0]))
def test_pseudo_cls_is_the_mean_of_the_relevant_words(seed, tau):
    """Eq. 8, and the fallback row by row: one prompt of the batch may have words, another none."""
    g = torch.Generator().manual_seed(seed)
    b, n, d = 3, 7, 5
    x, fallback = torch.randn(b, n, d, generator=g), torch.randn(b, d, generator=g)
    c = 0.5 * torch.randn(b, n, generator=g)
    c[0] = float("-inf")
    c[1, 2] = tau  # ≥, not >
    found = pseudo_cls(x, c, tau, fallback)
    for row in range(b):
        words = [x[row, i].double() for i in range(n) if c[row, i] >= tau]
        expected = torch.stack(words).mean(0) if words else fallback[row].double()
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0], fallback[0])


def test_relevance_is_a_cosine():
    cls, features = torch.randn(13), torch.randn(7, 13)
    expected = features.double() @ cls.double() / cls.double().norm() / features.double().norm(dim=1)
    torch.testing.assert_close(relevance(cls, features).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_guidance_by_hand(kind, open_clip_text):
    """Eq. 5–7 through a real model: per-token cosine of the projected visual CLS, spread over words by letters."""
    encoder = make_text_encoder() if kind == "transformers" else open_clip_text
    model, _ = ivtp.load_model(make_llava(seed=14), SimpleNamespace(tokenizer=word_tokenizer()), encoder)
    batch = inputs()
    with ivtp.prune(model, "ivtp", keep=5) as run:
        model(**batch)
    kept = run.trace.vision
    from helpers.reference import clip_states

    tower = model.model.vision_tower
    cls = tower.post_layernorm(clip_states(tower, batch["pixel_values"], kept)[-1][:, 0])
    joint = encoder.project(cls)
    for i, text in enumerate(TEXTS):
        spelled, letters = encoder.encode([text])[0], 0
        for word, found in run.trace.words[i]:
            own = range(letters, letters := letters + len(word))
            shared = [
                f for f, (s, e) in zip(spelled.features, spelled.spans, strict=True) if set(own) & set(range(s, e))
            ]
            cosine = torch.cosine_similarity(torch.stack(shared).double(), joint[i].double()[None]).mean()
            assert found == pytest.approx(float(cosine), abs=1e-4)


def test_a_model_without_its_clip_says_what_to_give():
    model = make_llava()
    with (
        pytest.raises(ivtp.backbones.ModelError, match="needs the model's processor"),
        ivtp.prune(model, "ivtp", keep=5),
    ):
        pass
    ivtp.load_model(model, SimpleNamespace(tokenizer=word_tokenizer()))
    with (
        pytest.raises(ivtp.backbones.ModelError, match="no CLIP text encoder is known"),
        ivtp.prune(model, "ivtp", keep=5),
    ):
        pass
    with ivtp.prune(model, "ivtp", keep=5, reference="visual_cls"):  # which needs no text
        model(**inputs())
    assert llava() is not model


@pytest.mark.parametrize("how", ["missing", "truncated", "unknown open_clip"])
def test_a_broken_text_encoder_is_one_line(how, tmp_path):
    model, source = make_llava(), str(tmp_path / "clip")
    if how == "truncated":
        make_text_encoder().model.save_pretrained(source)
        make_text_encoder().tokenizer.save_pretrained(source)
        weights = tmp_path / "clip" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    if how == "unknown open_clip":
        source = "open_clip:no-such-model"
    ivtp.load_model(model, SimpleNamespace(tokenizer=word_tokenizer()), source)
    with pytest.raises(ivtp.backbones.ModelError) as error, ivtp.prune(model, "ivtp", keep=5):
        pass
    assert "\n" not in str(error.value)
    assert source in str(error.value)
