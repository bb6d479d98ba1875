"""Oracle 5: streamed scores are those of dense float64 maps, whatever the sizes, padding, heads and token sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import dense_importance, dense_map, dense_rollout, dense_value_norm

from ivtp.pruning.attention import BLOCK, Attention
from ivtp.pruning.scores import COMBINES, Chance, Layerwise, Rollout
from ivtp.pruning.tokens import Tokens

SIZES = st.fixed_dictionaries(
    {
        "b": st.sampled_from([1, 2, 3]),
        "n": st.sampled_from([5, 13, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7]),
        "groups": st.sampled_from([1, 2, 3]),
        "shared": st.sampled_from([1, 2, 5]),
        "e": st.sampled_from([3, 7]),
        "layers": st.integers(1, 4),
        "causal": st.booleans(),
        "padded": st.booleans(),
        "sized": st.booleans(),
        "referring": st.sampled_from([1, 1, 2, "visual"]),
        "seed": st.integers(0, 10_000),
    }
)


def case(b, n, groups, shared, e, layers, causal, padded, sized, referring, seed):
    """Some layers' attentions over one sequence, its tokens, and the same as float64 dense maps."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.ones(b, n, dtype=torch.bool)
    if padded:
        for row in range(b):
            valid[row, : int(torch.randint(0, n // 3 + 1, (1,), generator=g))] = False
    size = torch.randint(1, 5, (b, n), generator=g).float() if sized else torch.ones(b, n)
    bias = None
    if padded or sized:
        bias = size.log().masked_fill(~valid, float("-inf"))
    attentions = []
    for _ in range(layers):
        q = 2 * torch.randn(b, groups * shared, n, e, generator=g)
        k, v = torch.randn(b, groups, n, e, generator=g), torch.randn(b, groups, n, e, generator=g)
        attentions.append(Attention(q, k, v, e**-0.5, bias, causal))
    visual = torch.zeros(b, n, dtype=torch.bool)
    visual[:, n // 3 : n - 1] = True
    reference = torch.zeros(b, n, dtype=torch.bool)
    if referring == "visual":
        reference = visual.clone()
    else:
        reference[:, n - referring :] = True
    tokens = Tokens.of(torch.zeros(b, n, 2), visual, reference, valid=valid)
    maps = [dense_map(a.q, a.k, a.scale, bias, causal) for a in attentions]
    weight = reference.double() / reference.sum(1, keepdim=True)
    index = visual.nonzero()[:, 1].view(b, -1)
    return attentions, tokens, maps, weight, index


def same(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@given(SIZES, st.sampled_from(COMBINES), st.booleans())
def test_rollout_is_equations_2_to_4_on_dense_maps(sizes, combine, value_norm):
    """Wrong here means tokens kept by something else than the paper's rollout, silently."""
    attentions, tokens, maps, weight, visual = case(**sizes)
    if combine in ("mean", "max"):
        rows = [(weight[:, None] @ m)[:, 0] for m in maps]
        row = dense_rollout(rows, combine)
    else:
        row = (weight[:, None] @ dense_rollout(maps, combine))[:, 0]
    norm = dense_value_norm(attentions[-1].v, attentions[-1].q.shape[1]) if value_norm else torch.ones_like(row)
    expected = dense_importance(row, norm * tokens.valid, visual)
    actual = Rollout(combine, value_norm)(attentions, tokens)
    assert actual.dtype == torch.float32
    same(actual, expected)


@given(SIZES, st.booleans())
def test_layerwise_reads_the_last_layer_only(sizes, value_norm):
    attentions, tokens, maps, weight, visual = case(**sizes)
    norm = dense_value_norm(attentions[-1].v, attentions[-1].q.shape[1]) if value_norm else torch.ones(1).double()
    expected = dense_importance((weight[:, None] @ maps[-1])[:, 0], norm * tokens.valid, visual)
    same(Layerwise(value_norm)(attentions, tokens), expected)


@given(SIZES)
def test_attention_answers_are_those_of_the_dense_map(sizes):
    """rows, propagate, map, value_norm, keys: every way to ask about a map that is never formed."""
    attentions, tokens, maps, _, _ = case(**sizes)
    attention, dense = attentions[0], maps[0]
    b, n = dense.shape[:2]
    g = torch.Generator().manual_seed(1)
    index, w = torch.randint(0, n, (b, 3), generator=g), torch.randn(b, n, generator=g)
    same(attention.rows(index), dense.gather(1, index[:, :, None].expand(-1, -1, n)))
    same(attention.propagate(w), (w.double()[:, None] @ dense)[:, 0])
    same(attention.map(), dense)
    same(attention.value_norm(), dense_value_norm(attention.v, attention.q.shape[1]))
    same(attention.keys(), attention.k.double().mean(1))
    real = attention.map().sum(2)[tokens.valid]
    torch.testing.assert_close(real, torch.ones_like(real))


def test_a_group_of_one_layer_has_no_residual():
    """Ã^{l1} = A^{l1} (Eq. 3): with one layer, residual and multiply are the layer's own row."""
    attentions, tokens, *_ = case(2, 13, 1, 2, 3, 1, False, False, False, 1, 3)
    rows = [Rollout(combine)(attentions, tokens) for combine in COMBINES]
    assert all(torch.equal(rows[0], row) for row in rows)


def noise_tokens(sample, positions, valid=None):
    positions = torch.as_tensor(positions)
    b, n = positions.shape
    all_true = torch.ones(b, n, dtype=torch.bool)
    return Tokens.of(torch.zeros(b, n, 1), all_true, all_true, position=positions, valid=valid, sample=sample)


def test_chance_belongs_to_the_sample_not_to_its_batch():
    position = torch.arange(25).expand(3, 25)
    sample = torch.tensor([5, -7, 2**61])
    together = Chance(3)([], noise_tokens(sample, position))
    for i in (2, 0, 1):
        assert torch.equal(Chance(3)([], noise_tokens(sample[i : i + 1], position[:1]))[0], together[i])
    assert len({tuple(row.tolist()) for row in together}) == 3
    assert not torch.equal(Chance(4)([], noise_tokens(sample, position)), together)


def test_chance_is_uniform_and_draws_anew_at_every_cut():
    """The floor of every table: a biased or repeated draw would make it wrong for all."""
    samples, n = 400, 24
    noise = Chance()([], noise_tokens(torch.arange(samples), torch.arange(n).expand(samples, n)))
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(float(noise.mean()) - 0.5) < 0.01
    kept = torch.zeros(n).scatter_add(0, noise.topk(6, 1).indices.flatten(), torch.ones(samples * 6))
    # 100 ± 8.7 expected at each place; 5 standard deviations
    assert (kept - samples / 4).abs().max() < 5 * (samples * 0.25 * 0.75) ** 0.5
    fewer = Chance()([], noise_tokens(torch.arange(samples), torch.arange(n - 1).expand(samples, n - 1)))
    correlation = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), fewer.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.05


def test_padding_is_never_kept_before_a_real_token():
    valid = torch.tensor([[False, True, True, False, True]])
    noise = Chance()([], noise_tokens(torch.tensor([1]), torch.arange(5)[None], valid))
    assert set(noise.topk(3).indices[0].tolist()) == {1, 2, 4}


def test_an_unknown_combine_says_what_there_is():
    with pytest.raises(ValueError, match="combine='median' is not one of residual, mean, max, multiply"):
        Rollout("median")
