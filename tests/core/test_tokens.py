"""The one method that shortens a sequence, and merging: invariants for any places, orders and ragged counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivtp.core.reduces import Drop, Merge
from ivtp.core.selects import Bipartite, TopK
from ivtp.core.tokens import Selection, Tokens


@st.composite
def sequences(draw):
    """Tokens whose fields all carry the token's own number, visual ones anywhere, and a selection in any order."""
    b, n = draw(st.integers(1, 3)), draw(st.sampled_from([5, 7, 11, 17]))
    v = draw(st.integers(1, n - 1))
    k = draw(st.integers(1, v))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    visual = torch.zeros(b, n, dtype=torch.bool)
    index = torch.empty(b, k, dtype=torch.long)
    for row in range(b):
        visual[row, torch.randperm(n, generator=g)[:v]] = True
        index[row] = torch.randperm(v, generator=g)[:k]
    number = torch.arange(b * n).view(b, n)
    valid = torch.rand(b, n, generator=g) > 0.3
    tokens = Tokens(
        x=number[:, :, None].float(),
        position=number,
        size=number.float() + 1,
        valid=valid,
        visual=visual,
        reference=torch.rand(b, n, generator=g) > 0.5,
        sample=torch.arange(b),
        feature=number[:, :, None].float() * 2,
    )
    ragged = torch.rand(b, k, generator=g) > 0.4 if draw(st.booleans()) else None
    return tokens, Selection(index, valid=ragged)


@given(sequences())
def test_keep_rewrites_all_fields_together_and_leaves_other_tokens_in_place(case):
    """A field forgotten would give a kept token another's position, size or padding."""
    tokens, selection = case
    short = tokens.keep(selection, Drop(), None)
    b, k = selection.index.shape
    for row in range(b):
        places = tokens.visual[row].nonzero()[:, 0]
        chosen = places[selection.index[row]].tolist()
        # Kept ones share out the places they stood at, in the order asked for: text between images stays between them.
        slots = sorted(chosen)
        expected = [
            chosen[slots.index(i)] if i in slots else i
            for i in range(tokens.x.shape[1])
            if i in slots or not tokens.visual[row, i]
        ]
        assert short.position[row].tolist() == tokens.position[row, expected].tolist()
        for name in ("x", "size", "visual", "reference", "feature"):
            assert torch.equal(getattr(short, name)[row], getattr(tokens, name)[row, expected]), name
        valid = tokens.valid[row, expected].clone()
        if selection.valid is not None:
            valid[short.visual[row]] &= selection.valid[row]
        assert torch.equal(short.valid[row], valid)
        others = ~tokens.visual[row]
        assert torch.equal(short.position[row][~short.visual[row]], tokens.position[row][others])
    assert torch.equal(short.sample, tokens.sample)
    assert short.visual_count == k


@given(sequences())
def test_an_appended_reference_leaves_no_trace(case):
    tokens, _ = case
    alone = Tokens(**{**vars(tokens), "feature": None})
    back = alone.append(torch.full((tokens.x.shape[0], 1), 9.0))
    assert back.reference.sum(1).eq(1).all()
    assert back.reference[:, -1].all()
    assert torch.equal(back.position[:, -1], tokens.position[:, -1] + 1)
    assert not back.visual[:, -1].any()
    again = back.without_last()
    for name in ("x", "position", "size", "valid", "visual"):
        assert torch.equal(getattr(again, name), getattr(alone, name)), name
    assert again.reference[:, -1].all()


@given(st.integers(1, 3), st.sampled_from([4, 5, 9, 24, 25]), st.integers(0, 999), st.booleans())
def test_merging_is_the_weighted_mean_and_keeps_the_sum_of_sizes(b, v, seed, cls):
    """Two steps, so that tokens of size 2 and more are merged again."""
    g = torch.Generator().manual_seed(seed)
    place = torch.arange(v + cls)[None]
    tokens = Tokens.of(
        torch.randn(b, v + cls, 3, generator=g), visual=place >= cls, reference=(place == 0) & bool(cls) | (place > v)
    )
    for keep in (v - v // 2, v - v // 2 - 1):
        metric = torch.randn(b, tokens.visual_count, 5, generator=g)
        selection = Bipartite()(None, metric, keep, tokens)
        short = tokens.keep(selection, Merge(), None)
        x, size = tokens.of_visual(tokens.x), tokens.of_visual(tokens.size)
        for row in range(b):
            assert sorted(set(selection.into[row].tolist())) == list(range(keep)), "every token ends somewhere"
            for slot in range(keep):
                members = (selection.into[row] == slot).nonzero()[:, 0]
                assert selection.index[row, slot] in members
                weight = size[row, members].double()
                mean = (weight[:, None] * x[row, members].double()).sum(0) / weight.sum()
                torch.testing.assert_close(short.of_visual(short.x)[row, slot].double(), mean, rtol=1e-5, atol=1e-6)
                assert short.of_visual(short.size)[row, slot] == weight.sum()
        assert torch.equal(short.size.sum(1), tokens.size.sum(1))
        tokens = short


def test_equal_scores_keep_the_lower_index_in_raster_order():
    """Otherwise the kept tokens would depend on the sorting kernel."""
    tokens = Tokens.of(torch.zeros(2, 6, 1), *[torch.ones(2, 6, dtype=torch.bool)] * 2)
    scores = torch.tensor([[1.0, 1, 1, 1, 1, 1], [0, 2, 1, 2, 1, 1]])
    assert TopK()(scores, None, 3, tokens).index.tolist() == [[0, 1, 2], [1, 2, 3]]


def test_more_merges_than_one_step_can_do_are_refused():
    tokens = Tokens.of(torch.zeros(1, 9, 1), *[torch.ones(1, 9, dtype=torch.bool)] * 2)
    with pytest.raises(ValueError, match=r"keep=4 of 9 tokens needs 5 merges in one step, but .* can do 4"):
        Bipartite()(None, torch.randn(1, 9, 3), 4, tokens)
