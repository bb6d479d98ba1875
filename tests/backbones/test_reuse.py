"""What a run makes once for all of its batches and rows: layouts of image sizes, features of instructions."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXTS, inputs, llava, make_text_encoder, plan_of
from helpers.families import FAMILIES, encode, family, photo

import ivtp
from ivtp.api import Pruning
from ivtp.backbones.family import PruneOptions, family_of
from ivtp.backbones.text.memory import GROUP, TextMemory

SIZES = ((40, 70), (70, 35), (70, 70), (36, 90))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_serves_many_batches_with_equal_results(name):
    """Sizes come back in another order and beside others; the results are those of a new adapter, to the bit."""
    model, *_ = family(name)
    adapter, question = family_of(model).adapter(model), "what color is the round thing ?"

    def logits(sizes, **options):
        batch = encode(name, [question] * len(sizes), [[photo(*size, seed=sum(size))] for size in sizes])
        with Pruning(model, "topk", {"keep": 5}, PruneOptions(**options)):
            return model(**batch).logits

    for sizes in (SIZES[:2], SIZES[1:3], SIZES[::-1], SIZES[:1]):
        assert torch.equal(logits(sizes, adapter=adapter), logits(sizes))


def test_each_size_of_images_is_laid_out_once(monkeypatch):
    """Half a second to a second for the fifty sizes of a batch, before each batch."""
    model, *_ = family("llava_next")
    adapter, made = family_of(model).adapter(model), []
    lay_out = type(adapter)._layout
    monkeypatch.setattr(type(adapter), "_layout", lambda self, *size: made.append(size) or lay_out(self, *size))
    batch = encode("llava_next", ["what ?"] * 2, [[photo(*size)] for size in SIZES[:2]])
    for plan in ("topk", "random", None):
        with Pruning(model, plan, {"keep": 5} if plan else {}, PruneOptions(adapter=adapter)):
            model(**batch)
    assert made == [(size, True) for size in SIZES[:2]]


@pytest.mark.parametrize(("name", "most"), [("llava_next", 1), ("qwen2_5_vl", 40)])
def test_layouts_of_earlier_batches_are_forgotten_where_they_are_many(name, most, monkeypatch):
    """A benchmark of documents has a size of its own for each image; a GPU would fill with their layouts."""
    import sys

    model, *_ = family(name)
    adapter = family_of(model).adapter(model)
    monkeypatch.setattr(sys.modules[type(adapter).__module__], "MOST", most)
    for size in (*SIZES[1:], SIZES[1]):
        batch = encode(name, ["what ?"], [[photo(*size)]])
        with Pruning(model, "topk", {"keep": 5}, PruneOptions(adapter=adapter)):
            found = model(**batch).logits
        with ivtp.prune(model, "topk", keep=5):
            assert torch.equal(found, model(**batch).logits)
        assert len(adapter.kinds) <= 2


def test_a_memory_of_stacks_ends_with_its_batch():
    """Rotary embeddings of all patches of a batch, kept for each size, would fill a GPU."""
    model, *_ = family("qwen2_5_vl")
    adapter = family_of(model).adapter(model)
    with Pruning(model, "topk", {"keep": 5}, PruneOptions(adapter=adapter)):
        model(**encode("qwen2_5_vl", ["what ?"], [[photo(70, 70)]]))
    assert all(stack._packing is None for _, stack in adapter.kinds.values())


class Counted:
    """The texts that a text encoder was given, call by call."""

    def __init__(self) -> None:
        self.inner, self.calls = make_text_encoder(), []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, texts):
        self.calls.append(list(texts))
        return self.inner.encode(texts)

    def embed(self, texts):
        self.calls.append(list(texts))
        return self.inner.embed(texts)


ASKED = [f"{TEXTS[i % 3]} {i // 2}" for i in range(3 * GROUP)]


def test_each_instruction_is_encoded_once_whatever_batches_ask_for_it():
    counted = Counted()
    memory = TextMemory(counted, ASKED)
    for start in (0, 7, 150, 7):
        memory.encode(ASKED[start : start + 9])
    memory.encode(ASKED)
    encoded = [text for call in counted.calls for text in call]
    assert sorted(encoded) == sorted(set(ASKED)) and max(map(len, counted.calls)) == GROUP
    assert memory.lengths(ASKED[:2]) == counted.inner.lengths(ASKED[:2]) and memory.joint == 13


@pytest.mark.parametrize("method", ["encode", "embed"])
def test_features_do_not_depend_on_what_was_asked_before(method):
    """A restart, another rank and another row ask in another order; their results are equal to the bit."""

    def features(memory, texts):
        found = getattr(memory, method)(texts)
        return [one.features for one in found] if method == "encode" else found

    first, later = TextMemory(make_text_encoder(), ASKED), TextMemory(make_text_encoder(), ASKED)
    features(first, ASKED)
    expected = features(first, ASKED[70:75])
    found = features(later, ASKED[73:75] + ASKED[70:73])
    assert all(torch.equal(a, b) for a, b in zip(found, expected[3:] + expected[:3], strict=True))
    unknown = features(later, ["is it red ?", *ASKED[:2]])
    assert torch.equal(unknown[0], features(first, ["is it red ?"])[0])
    for one, other in zip(expected, features(make_text_encoder(), ASKED[70:75]), strict=True):
        torch.testing.assert_close(one, other)


def test_features_take_bounded_memory():
    counted = Counted()
    whole = TextMemory(make_text_encoder(), ASKED)
    whole.encode(ASKED)
    memory = TextMemory(counted, ASKED, limit=whole.bytes // 2)
    for _ in range(2):
        for one, other in zip(memory.encode(ASKED), whole.encode(ASKED), strict=True):
            assert torch.equal(one.features, other.features) and one.spans == other.spans
        assert 0 < memory.bytes <= memory.limit
    assert len(counted.calls) == 6


@pytest.mark.parametrize("name", ["ivtp", "cdpruner"])
def test_a_pruned_run_reads_the_memory_in_place_of_the_encoder(name):
    model, batch = llava(), inputs()
    plan = plan_of(name, model)
    assert plan.reads_clip or plan.reads_relevance
    memory = TextMemory(counted := Counted(), TEXTS)
    for _ in range(2):
        with Pruning(model, plan, {}, PruneOptions(instruction=list(TEXTS), text_encoder=memory)):
            found = model(**batch).logits
        with ivtp.prune(model, plan, instruction=list(TEXTS)):
            torch.testing.assert_close(found, model(**batch).logits)
    assert counted.calls == [list(TEXTS)]
