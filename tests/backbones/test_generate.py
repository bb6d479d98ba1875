"""The contract of `generate` inside `ivtp.prune`: works as in transformers, equal to recomputation, or refused in one line."""

import copy
import io
import threading
from contextlib import nullcontext

import pytest
import torch
from conftest import KEEP, close, inputs, make_llava, make_text_encoder
from conftest import TEXTS as SENTENCES
from helpers.families import FAMILIES, GUIDED, TEXTS, batch, encode, family, photo
from helpers.reference_families import family_logits
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer, TextStreamer

import ivtp
from ivtp.backbones.hooks.attention_interface import CACHE
from ivtp.backbones.language.cache import PrunedLayer
from ivtp.registry import UserError

KINDS = {"topk": "tower", "fastv": "language model", "ivtp": "both", "ats": "ragged", "tome": "merging"}
"""One pruner of each kind."""
VISUAL = {"llava": 11, "llava_next": 41, "llava_onevision": 41, "qwen2_5_vl": 11, "qwen3_vl": 11, "internvl": 15}
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def settings(kind: str, name: str) -> dict:
    last = {"reference": "last"} if name == "ivtp" and kind not in GUIDED else {}
    return {"keep": VISUAL[kind]} | last


def answer(model, tokens: int = 3, cache=None, **asked):
    """Greedy decoding: all of `generate`'s output, and its logits "b tokens vocabulary"."""
    given = {} if cache is None else {CACHE: cache}
    out = model.generate(**GREEDY | {"max_new_tokens": tokens} | asked, **given)
    return out, torch.stack(out.logits, 1)


def question(mask, length: int, seed: int, padded: bool = True):
    """New text behind a conversation, and the mask of all: rows of different length, padded on the left."""
    ids = torch.randint(5, 200, (len(mask), length), generator=torch.Generator().manual_seed(seed)).to(mask.device)
    valid = torch.ones_like(ids)
    if padded:
        valid[1:, :2] = 0
    return ids * valid, torch.cat([mask, valid], 1)


def grown(mask, tokens: int = 3):
    return torch.cat([mask, mask.new_ones(len(mask), tokens)], 1)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_turns_go_on_as_if_the_whole_conversation_were_recomputed(kind, name):
    """Turn 2 repeats the whole conversation, turn 3 gives only its new tokens: chat loops do either. Padding stands
    before and between turns; another prompt (of another image size) is answered in between."""
    model, first = family(kind)[0], batch(kind)
    size = (35, 35) if kind == "llava" else (84, 42)
    other = encode(kind, TEXTS, [[photo(*size, i)] for i in range(3)])
    with ivtp.prune(model, name, **settings(kind, name)) as run:
        out, _ = answer(model, **first)
        cache, trace = out[CACHE], run.trace
        answer(model, 1, **other)
        more, mask2 = question(grown(first["attention_mask"]), 5, 1)
        whole = torch.cat([out.sequences, more], 1)
        out, second = answer(model, cache=cache, input_ids=whole, attention_mask=mask2)
        assert out[CACHE] is cache
        answer(model, 1, **other)
        more, mask3 = question(grown(mask2), 4, 2)
        start = cache.get_seq_length()
        asked = torch.cat([out.sequences, more], 1)
        out, third = answer(model, cache=cache, input_ids=asked[:, start:], attention_mask=mask3)
        assert cache.get_seq_length() == mask3.shape[1] + 2  # the last token of an answer is not in the cache
        if name == "tome":
            # No mask equals a merge. Its tower does not read the text, so that a new prefill merges the same tokens.
            anew = {k: v for k, v in first.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
            for ids, mask, logits in ((whole, mask2, second), (asked, mask3, third)):
                types = {}
                if "mm_token_type_ids" in first:
                    types["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
                expected = answer(model, input_ids=ids, attention_mask=mask, **anew, **types)[1]
                close(logits, expected, 3e-5)
            return
    sequences = torch.cat([asked, out.sequences[:, -3:]], 1)
    full, _ = family_logits(model, first, sequences, trace, grown(mask3))
    close(second, full[:, whole.shape[1] - 1 : whole.shape[1] + 2], 3e-5)
    close(third, full[:, -4:-1], 3e-5)


def ended(answers, eos: int):
    """The mask of answers "b n": 0 behind the first EOS."""
    is_eos = (answers == eos).long()
    return (is_eos.cumsum(1) - is_eos == 0).long()


@pytest.mark.parametrize("name", ["fastv", "ats"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_that_ended_early_go_on_in_the_next_turn(kind, name):
    """Batched chat: `generate` pads the row that ended with EOS, and only the next turn's mask says so."""
    model, first = family(kind)[0], batch(kind)
    n = first["input_ids"].shape[1]
    with ivtp.prune(model, name, **settings(kind, name)) as run:
        eos = int(answer(model, 2, **first)[0].sequences[0, n + 1])
        out, _ = answer(model, 4, eos_token_id=eos, pad_token_id=0, **first)
        trace, cache = run.trace, out[CACHE]
        done = ended(out.sequences[:, n:], eos)
        assert not done[0, -1] and done[1:].sum() > 2, "row 0 must end before another row"
        known = torch.cat([first["attention_mask"], done], 1)
        more, mask2 = question(known, 5, 1)
        whole = torch.cat([out.sequences, more], 1)
        branch = copy.deepcopy(cache)
        out, second = answer(model, 4, cache=cache, input_ids=whole, attention_mask=mask2)
        if kind.startswith("qwen"):  # other families' own forward counts padding
            new = whole[:, branch.get_seq_length() :]
            close(model(input_ids=new, attention_mask=mask2, **{CACHE: branch}).logits[:, -1], second[:, 0], 3e-5)
        done = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
        known = torch.cat([mask2, done], 1)
        more, mask3 = question(known, 1, 2, padded=False)
        asked = torch.cat([out.sequences, more], 1)
        last, third = answer(model, cache=cache, input_ids=asked, attention_mask=mask3)
    full, _ = family_logits(model, first, out.sequences, trace, grown(mask2, 4))
    close(second, full[:, -5:-1], 3e-5)
    full, _ = family_logits(model, first, last.sequences, trace, grown(mask3))
    close(third, full[:, -4:-1], 3e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_beams_and_samples_see_the_images_of_their_own_prompt(kind):
    """Of prompts with no image, one and several: every beam of a prompt starts from the same logits as its greedy answer."""
    model = family(kind)[0]
    size = (35, 35) if kind == "llava" else (84, 70)
    first = encode(kind, TEXTS, [[photo(*size, 1), photo(*size, 2)], [], [photo(*size, 3)]])
    with ivtp.prune(model, "fastv", keep=VISUAL[kind]) as run:
        expected = answer(model, 1, **first)[1]
        beams = answer(model, 1, num_beams=3, **first)[1]
        assert len(run.trace.kept.position) == 9
        samples = answer(model, 1, do_sample=True, num_return_sequences=2, **first)[1]
        uncached = answer(model, 1, num_beams=2, use_cache=False, **first)[1]
    close(beams, expected.repeat_interleave(3, 0), 3e-5)
    close(samples, expected.repeat_interleave(2, 0), 3e-5)
    close(uncached, expected.repeat_interleave(2, 0), 3e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_beams_go_on_from_a_repeated_cache(kind):
    """One cached prompt for each beam; topk does not read the text, so a new prefill of everything is the oracle."""
    model, first = family(kind)[0], batch(kind)
    beams = {"num_beams": 2, "output_scores": True}
    with ivtp.prune(model, "topk", keep=VISUAL[kind]):
        cache = answer(model, 3, **first)[0][CACHE]
        n = cache.get_seq_length()
        out, _ = answer(model, 3, **first)
        more, mask = question(grown(first["attention_mask"]), 4, 1)
        whole = torch.cat([out.sequences, more], 1)
        anew = {k: v for k, v in first.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        if "mm_token_type_ids" in first:
            anew["mm_token_type_ids"] = (whole == model.config.image_token_id).int()
        asked = {"input_ids": whole, "attention_mask": mask}
        expected, _ = answer(model, **asked, **beams, **anew)
        cache.batch_repeat_interleave(2)
        assert cache.get_seq_length() == n
        found, _ = answer(model, cache=cache, **asked, **beams)
    assert torch.equal(found.sequences, expected.sequences)
    close(found.sequences_scores, expected.sequences_scores, 3e-5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_copied_cache_answers_several_questions(kind):
    """One prefill, deep copies for the branches, also repeated, selected and reordered rows."""
    model, first = family(kind)[0], batch(kind)
    with ivtp.prune(model, "ats", keep=VISUAL[kind]) as run:
        cache = model(**first, use_cache=True)[CACHE]
        trace = run.trace
        for rows, change in (
            ([0, 1, 2], lambda cache: None),
            ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
            ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
            ([1, 1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0]))),
        ):
            branch = copy.deepcopy(cache)
            change(branch)
            own = {k: v for k, v in first.items() if not k.startswith(("pixel", "image_grid"))}
            own = {k: v[rows] for k, v in own.items()}
            ids, mask = question(own["attention_mask"], 4, len(rows), padded=False)
            logits = model(input_ids=ids, attention_mask=mask, **{CACHE: branch}).logits
            sequences = torch.cat([first["input_ids"], ids.new_zeros(3, 4)], 1)
            for place, row in enumerate(rows):
                sequences[row, -4:] = ids[place]
                position = {} if kind != "llava" else {"position_ids": None}
                full = masked_forward(model, first, sequences, trace, **position)
                close(logits[place], full[row, -4:], 3e-5)
        assert cache.get_seq_length() == first["input_ids"].shape[1]


def masked_forward(model, first, sequences, trace, **position):
    """The oracle where positions were not given: LLaVA's own forward counts padding."""
    if not position:
        return family_logits(model, first, sequences, trace)[0]
    from helpers.reference import llava_logits

    mask = grown(first["attention_mask"], sequences.shape[1] - first["input_ids"].shape[1])
    places = torch.arange(sequences.shape[1]).expand_as(sequences)
    cuts = [*trace.vision], [*trace.language]
    return llava_logits(model, sequences, first["pixel_values"], mask, *cuts, position_ids=places)[0]


@pytest.fixture
def crops(monkeypatch):
    """How many tokens each rejection took out of a pruned cache."""
    taken, crop = [], PrunedLayer.crop
    monkeypatch.setattr(PrunedLayer, "crop", lambda self, n: (taken.append(-n), crop(self, n))[1])
    return taken


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_assisted_generation_decodes_the_same(kind, name, crops):
    """Drafts that are accepted and drafts that are rejected, by prompt lookup and by a model: they are no part of the
    prompt, so the same image tokens stay, and a rejection leaves no key behind."""
    model = family(kind)[0]
    first = encode(kind, [TEXTS[1] + TEXTS[1]], [[photo(35, 35) if kind == "llava" else photo(84, 42)]])
    asked = settings(kind, name)
    with ivtp.prune(model, name, **asked) as run:
        plain, logits = answer(model, 7, **first)
        kept = run.trace.kept.position
        by_lookup = answer(model, 7, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **first)
        assert torch.equal(run.trace.kept.position, kept)
        by_itself = answer(model, 7, assistant_model=model, **first)
    for out, found in (by_lookup, by_itself):
        assert torch.equal(out.sequences, plain.sequences)
        close(found, logits, 3e-5)
    assert max(crops) > 0, "nothing was rejected"


@pytest.mark.parametrize("seen", ["pruned alike", "pruned otherwise", "unpruned"])
def test_another_model_may_assist(seen, crops):
    """An assistant sees the image as its own context says; whatever it drafts, the answer is the pruned model's."""
    model, first = family("llava")[0], batch("llava", TEXTS[:1])
    assistant = FAMILIES["llava"]()[0]
    ivtp.load_model(assistant, family("llava")[1], make_text_encoder())
    noise = torch.Generator().manual_seed(3)
    for weight in assistant.model.language_model.layers[-1].parameters():
        weight.add_(0.3 * torch.randn(weight.shape, generator=noise))
    context = {"pruned alike": ("ivtp", 11), "pruned otherwise": ("fastv", 3)}.get(seen)
    with (
        ivtp.prune(model, "ivtp", keep=11),
        ivtp.prune(assistant, context[0], keep=context[1]) if context else nullcontext(),
    ):
        plain, logits = answer(model, 9, **first)
        out, found = answer(model, 9, assistant_model=assistant, **first)
    assert torch.equal(out.sequences, plain.sequences)
    close(found, logits, 3e-5)
    assert crops.count(0) > 0 and max(crops) > 0, "drafts must be accepted and rejected here"


def test_other_ways_to_ask_give_the_same_answer():
    """GenerationConfig, no mask, a cache of one's own, inference mode, streams (from a thread too), decoding by hand."""
    model, processor, _ = family("llava")
    first = batch("llava", TEXTS[:1])
    unmasked = {k: v for k, v in first.items() if k != "attention_mask"}
    with ivtp.prune(model, "ivtp", keep=11) as run:
        plain, logits = answer(model, **first)
        text = processor.tokenizer.decode(plain.sequences[0, first["input_ids"].shape[1] :])
        config = GenerationConfig(**GREEDY, max_new_tokens=3, pad_token_id=0)
        mine = DynamicCache()
        with torch.inference_mode():
            inferred = answer(model, **first)
        ways = [
            model.generate(**first, generation_config=config),
            answer(model, **unmasked)[0],
            answer(model, cache=mine, **first)[0],
            inferred[0],
            answer(model, cache_implementation="dynamic", **first)[0],
            answer(model, streamer=TextStreamer(processor.tokenizer, skip_prompt=True), **first)[0],
        ]
        assert ways[2][CACHE] is mine
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=answer, args=(model,), kwargs={**first, "streamer": streamer})
        thread.start()
        assert "".join(streamer) == text
        thread.join()
        cache = model.forward(**first, use_cache=True)[CACHE]
        decoded = plain.sequences[:, -3:-1].split(1, 1)
        steps = [model.forward(input_ids=token, **{CACHE: cache}).logits for token in decoded]
        assert run.trace.kept.position.shape[1] == 11
    for out in ways:
        assert torch.equal(out.sequences, plain.sequences)
        close(torch.stack(out.logits, 1), logits)
    close(torch.cat(steps, 1), logits[:, 1:])


def test_a_filled_cache_is_a_dynamic_cache_with_the_length_of_the_text():
    """Outside tools read its layers; a later context with the same settings goes on with it."""
    model, first = family("llava")[0], batch("llava", TEXTS[:1])
    n, mine = first["input_ids"].shape[1], DynamicCache()
    with ivtp.prune(model, "ivtp", keep=11) as run:
        out, _ = answer(model, cache=mine, **first)
        lengths = {layer.keys.shape[2] for layer in mine.layers}
        assert type(mine) is DynamicCache
        assert lengths == {n + 2 - 25 + 11, *(n + 2 - 25 + cut.position.shape[1] for cut in run.trace.vision[-1:])}
        assert mine.get_seq_length() == mine.get_seq_length(8) == n + 2
    more = torch.cat([out.sequences, torch.tensor([[7, 8]])], 1)
    with ivtp.prune(model, "ivtp", keep=11):
        _, logits = answer(model, cache=mine, input_ids=more)
    full, _ = family_logits(model, first, more, run.trace)
    close(logits[:, 0], full[:, -1])
    mine.reset()
    expected = model(**first).logits
    assert torch.equal(model(**first, **{CACHE: mine}).logits, expected), "an emptied cache is anybody's"


def test_labels_of_an_answer_behind_the_cached_prompt_give_its_loss():
    """The loss of an answer under pruning: prefill the prompt, then the answer with its labels."""
    model, first = family("llava")[0], batch("llava", TEXTS[:1])
    text = torch.tensor([[9, 8, 7, 6, 5]])
    with ivtp.prune(model, "fastv", keep=5) as run:
        cache = model(**first)[CACHE]
        loss = model(input_ids=text, labels=text, **{CACHE: cache}).loss
    full, _ = family_logits(model, first, torch.cat([first["input_ids"], text], 1), run.trace)
    close(loss, torch.nn.functional.cross_entropy(full[0, -5:-1], text[0, 1:]))
    with ivtp.prune(model, "none"):
        kept = model(**first, labels=first["input_ids"]).loss
    close(kept, model(**first, labels=first["input_ids"]).loss)


def test_without_a_cache_the_same_tokens_are_chosen_at_every_step():
    """A tower that reads no text prunes alike every time; a method that reads the prompt's end would not, and says so."""
    model, first = family("llava")[0], batch("llava")
    for name in ("topk", "tome", "ats"):
        with ivtp.prune(model, name, keep=11):
            close(answer(model, use_cache=False, **first)[1], answer(model, **first)[1], 3e-5)
    for name in ("fastv", "ivtp", "cdpruner"):
        with ivtp.prune(model, name, keep=11):
            close(answer(model, 1, use_cache=False, **first)[1], answer(model, 1, **first)[1], 3e-5)
            with pytest.raises(UserError, match="leave use_cache out, or generate one token"):
                answer(model, 2, use_cache=False, **first)


def continued(model, first, **asked):
    cache = answer(model, 1, **first)[0][CACHE]
    return answer(model, cache=cache, **asked)


REFUSED = {
    "a new image": (lambda m, b: continued(m, b, **b | {"input_ids": doubled(b)}), "only a conversation's first call"),
    "new tokens with their own mask": (
        lambda m, b: continued(m, b, input_ids=b["input_ids"][:, -7:]),
        "no token follows",
    ),
    "a mask of another length": (
        lambda m, b: continued(m, b, input_ids=b["input_ids"][:, -7:], attention_mask=torch.zeros(1, 9).long()),
        "attention_mask has 9 columns",
    ),
    "most of the new tokens lost": (
        lambda m, b: continued(m, b, input_ids=torch.full((1, b["input_ids"].shape[1] - 3), 7)),
        r"position_ids of the new tokens start at \d+, but the cache goes on at|attention_mask has \d+ columns",
    ),
    "other rows": (lambda m, b: by_hand(m, b, torch.tensor([[7], [8]])), "holds 1 prompts, but input_ids has 2 rows"),
    "four axes of a mask": (lambda m, b: m(**b | {"attention_mask": torch.ones(1, 1, 9, 9)}), "one row per prompt"),
    "labels": (lambda m, b: m(**b, labels=b["input_ids"]), "then pass the answer as input_ids and labels"),
    "places of logits": (lambda m, b: m(**b, logits_to_keep=torch.tensor([1, 3])), "give a number"),
    "attentions": (lambda m, b: m.generate(**b, output_attentions=True, return_dict_in_generate=True), "run's trace"),
    "states": (lambda m, b: m.generate(**b, output_hidden_states=True, return_dict_in_generate=True), "run's trace"),
    "embeddings": (lambda m, b: m.generate(inputs_embeds=m.get_input_embeddings()(b["input_ids"])), "give input_ids"),
    "a static cache": (lambda m, b: m.generate(**b, cache_implementation="static"), "leave cache_implementation out"),
    "a static cache of one's own": (
        lambda m, b: answer(m, cache=StaticCache(config=m.config.text_config, max_cache_len=99), **b),
        "StaticCache: pruning leaves",
    ),
    "fewer rows": (
        lambda m, b: [c := m(**b)[CACHE], c.batch_repeat_interleave(3), m(torch.tensor([[7]]), **{CACHE: c})],
        "holds 3 prompts, but input_ids has 1 rows; .*batch_select_indices",
    ),
    "prompt lookup in a later turn": (
        lambda m, b: continued(m, b, input_ids=doubled(b)[:, :-9], prompt_lookup_num_tokens=2),
        "assisted generation cannot go on from a filled cache",
    ),
    "an assistant in a later turn": (
        lambda m, b: continued(m, b, input_ids=doubled(b)[:, :-9], assistant_model=m),
        "assisted generation cannot go on from a filled cache",
    ),
    "continuous batching": (lambda m, b: m.generate_batch([[5, 6, 7]]), "generate_batch: .* call generate on a padded"),
    "a manager of it": (lambda m, b: m.init_continuous_batching(), "init_continuous_batching: .* call generate on"),
    "image tokens cropped": (lambda m, b: m(**b)[CACHE].crop(-30), r"at most \d+ tokens, those behind the last image"),
}


def doubled(first):
    return torch.cat([first["input_ids"], first["input_ids"]], 1)


def by_hand(model, first, ids):
    return model(input_ids=ids, **{CACHE: model(**first)[CACHE]})


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_wrong_is_refused_in_one_line(what):
    call, message = REFUSED[what]
    model, first = family("llava")[0], batch("llava", TEXTS[:1])
    with ivtp.prune(model, "ivtp", keep=11), pytest.raises(UserError, match=message) as error:
        call(model, first)
    assert "\n" not in str(error.value)


def turned(row: int | None, place: int | None):
    """Turn 2 with one wrong number in the mask of what is cached, at a place behind the prompt; None: of padding."""

    def call(model, first, cache, sequences):
        mask = grown(first["attention_mask"], 5)
        column = 0 if place is None else first["input_ids"].shape[1] + place
        padded = int(mask[:, 0].argmin()) if place is None else row
        assert mask[padded, column] == (place is not None)
        mask[padded, column] = place is None
        more = torch.tensor([[9, 8]]).expand(3, -1)
        answer(model, cache=cache, input_ids=torch.cat([sequences, more], 1), attention_mask=mask)

    return call


WRONG_BATCH = {
    "a prompt's word": (turned(1, -1), "hides 1 tokens of row 1 that the cache holds as visible"),
    "an answer's first word": (turned(2, 0), "hides 1 tokens of row 2 that the cache holds as visible"),
    "padding": (turned(None, None), r"shows 1 tokens of row \d that the cache holds as padding"),
    "one row": (
        lambda m, b, cache, ids: answer(
            m, cache=cache, input_ids=ids[:1], attention_mask=grown(b["attention_mask"])[:1]
        ),
        "holds 3 prompts, but input_ids has 1 rows; select .*batch_select_indices",
    ),
    "four rows": (
        lambda m, b, cache, ids: answer(m, cache=cache, input_ids=ids[[0, 0, 1, 2]]),
        "holds 3 prompts, but input_ids has 4 rows; select .*batch_select_indices",
    ),
    "six rows": (
        lambda m, b, cache, ids: answer(m, cache=cache, input_ids=ids.repeat(2, 1)),
        "holds 3 prompts, but input_ids has 6 rows; repeat .*batch_repeat_interleave",
    ),
    "a mask of one row": (
        lambda m, b, cache, ids: answer(m, cache=cache, input_ids=ids, attention_mask=grown(b["attention_mask"])[:1]),
        "attention_mask has 1 rows, but input_ids has 3",
    ),
    "a wide mask": (
        lambda m, b, *_: answer(m, **b | {"attention_mask": b["attention_mask"].repeat(1, 2)}),
        r"attention_mask is \(3, \d+\), but input_ids is \(3, \d+\)",
    ),
    "a mask of other rows": (
        lambda m, b, *_: m(**b | {"attention_mask": b["attention_mask"][:2]}),
        r"attention_mask is \(2, \d+\), but input_ids is \(3, \d+\)",
    ),
    "a static cache": (
        lambda m, b, *_: answer(m, cache_implementation="static", **b),
        "leave cache_implementation out",
    ),
}


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_batch_that_does_not_fit_is_refused_in_one_line(kind):
    """Masks and rows other than those of the cache or the prompts; the cache can still be continued rightly."""
    model, first = family(kind)[0], batch(kind)
    with ivtp.prune(model, "topk", keep=VISUAL[kind]):
        out, _ = answer(model, **first)
        for what, (call, message) in WRONG_BATCH.items():
            with pytest.raises(UserError, match=message) as error:
                call(model, first, out[CACHE], out.sequences)
            assert "\n" not in str(error.value), what
        more, mask = question(grown(first["attention_mask"]), 2, 1, padded=False)
        asked = {"input_ids": torch.cat([out.sequences, more], 1), "attention_mask": mask}
        expected = answer(model, cache=answer(model, **first)[0][CACHE], **asked)[1]
        assert torch.equal(answer(model, cache=out[CACHE], **asked)[1], expected)


def test_a_pickled_cache_can_be_read_but_not_continued():
    """Tensors and lengths survive `torch.save`; which model and plan filled it cannot."""
    model, first, file = family("llava")[0], batch("llava", TEXTS[:1]), io.BytesIO()
    with ivtp.prune(model, "topk", keep=11):
        cache = model(**first)[CACHE]
        torch.save(cache, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert loaded.get_seq_length() == cache.get_seq_length()
        for ours, theirs in zip(cache.layers, loaded.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        with pytest.raises(UserError, match="not filled under the pruning that is in force"):
            model(input_ids=torch.tensor([[7]]), **{CACHE: loaded})
        model(input_ids=torch.tensor([[7]]), **{CACHE: cache})
    with pytest.raises(UserError, match="start without a cache"):
        model(input_ids=torch.tensor([[7]]), **{CACHE: loaded})


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_a_cache_is_continued_only_by_what_filled_it(kind):
    """Of another plan, outside the context, inside with one from outside, of another model: each one line."""
    model, first = family(kind)[0], batch(kind, TEXTS[:1])
    token, keep = torch.tensor([[7]]), VISUAL[kind]
    elsewhere = model(**first, use_cache=True)[CACHE]
    with ivtp.prune(model, "topk", keep=keep):
        cache = model(**first, use_cache=True)[CACHE]
        before = model(input_ids=token, **{CACHE: copy.deepcopy(cache)}).logits
        for name, others in (("topk", keep - 2), ("fastv", keep)):
            with ivtp.prune(model, name, keep=others), pytest.raises(UserError, match="not filled under the pruning"):
                model(input_ids=token, **{CACHE: cache})
        with pytest.raises(UserError, match="not filled under the pruning"):
            model(input_ids=token, **{CACHE: elsewhere})
        twin = FAMILIES[kind]()[0]
        with ivtp.prune(twin, "topk", keep=keep), pytest.raises(UserError, match="not filled under the pruning"):
            twin(input_ids=token, **{CACHE: cache})
        assert torch.equal(model(input_ids=token, **{CACHE: copy.deepcopy(cache)}).logits, before)
    for use in (
        lambda: model(input_ids=token, **{CACHE: cache}),
        lambda: model.generate(input_ids=torch.cat([first["input_ids"], token], 1), max_new_tokens=1, **{CACHE: cache}),
    ):
        with pytest.raises(UserError, match="continue it inside") as error:
            use()
        assert "\n" not in str(error.value)


def test_strategies_that_transformers_moved_to_the_hub_are_refused_by_it():
    """Contrastive, constrained, group-beam and DoLa decoding run code from the hub, which is asked for by name only."""
    model, first = family("llava")[0], batch("llava", TEXTS[:1])
    with ivtp.prune(model, "topk", keep=11):
        for strategy in (
            {"penalty_alpha": 0.6, "top_k": 4},
            {"num_beams": 2, "force_words_ids": [[5]]},
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
            {"dola_layers": "high"},
            {"prefill_chunk_size": 16},
        ):
            message = "prefill_chunk_size|image tokens" if "prefill_chunk_size" in strategy else "trust_remote_code"
            with pytest.raises(ValueError, match=message):
                model.generate(**first, max_new_tokens=2, **strategy)


def test_a_long_second_turn_in_chunks():
    """Only text can be prefilled in chunks: the question behind an image that the cache holds."""
    model, first = family("llava")[0], batch("llava", TEXTS[:1])
    with ivtp.prune(model, "ivtp", keep=11):
        cache = model(**first)[CACHE]
        ids, mask = question(first["attention_mask"], 11, 5, padded=False)
        expected = answer(model, cache=copy.deepcopy(cache), input_ids=ids, attention_mask=mask)[1]
        whole = torch.cat([first["input_ids"], ids], 1)
        older = pytest.raises(UserError, match="attention_mask has 4 columns") if CACHE == "past_key_values" else None
        with older or nullcontext():  # transformers 5.17 counts its chunks from 0, whatever the cache holds
            close(answer(model, cache=cache, input_ids=whole, prefill_chunk_size=4)[1], expected, 3e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="an offloaded cache needs a GPU to be offloaded from")
def test_an_offloaded_cache_decodes_the_same():
    model, first = copy.deepcopy(family("llava")[0]).cuda(), {k: v.cuda() for k, v in batch("llava").items()}
    with ivtp.prune(model, "fastv", keep=11):
        expected = answer(model, **first)
        out, logits = answer(model, cache_implementation="offloaded", **first)
    assert torch.equal(out.sequences, expected[0].sequences)
    close(logits, expected[1], 1e-4)


# wrapped models


def test_lora_is_pruned_as_the_merged_model():
    """A PEFT-wrapped model goes into `prune` and `load_model` as it is."""
    from peft import LoraConfig, get_peft_model

    first = inputs(SENTENCES[:2])
    for task in (None, "CAUSAL_LM"):
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task)
        wrapped = get_peft_model(make_llava(), lora).eval()
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
        assert ivtp.shape_of(wrapped) == ivtp.shape_of(make_llava())
        with ivtp.prune(wrapped, "fastv", keep=KEEP) as run:
            logits = answer(wrapped, **first)[1]
        merged = wrapped.merge_and_unload()
        with ivtp.prune(merged, "fastv", keep=KEEP) as expected:
            close(logits, answer(merged, **first)[1], 1e-4)
        assert torch.equal(run.trace.kept.position, expected.trace.kept.position)


def test_a_compiled_model_is_pruned_and_comes_back_compiled():
    """torch.compile(model) that ran before the context: the graph of the unpruned model must not answer inside it."""
    model, first = make_llava(), inputs(SENTENCES[:1])
    with ivtp.prune(model, "fastv", keep=KEEP):
        expected = model(**first).logits
    compiled = torch.compile(model, backend="eager")
    plain = compiled(**first).logits
    with ivtp.prune(compiled, "fastv", keep=KEEP):
        assert torch.equal(compiled(**first).logits, expected)
        answer(compiled, 2, **first)
    close(compiled(**first).logits, plain)
