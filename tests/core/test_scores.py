"""Oracle 5: streamed scores are those of dense float64 maps, whatever the sizes, padding, heads and token sizes."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.place import DEVICE, PRETENDED, ROUNDING
from helpers.reference import dense_importance, dense_map, dense_rollout, dense_value_norm
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ivtp.core.attention import Attention
from ivtp.core.kernels import ROWS, column_sums, streamed_sums
from ivtp.core.scores import COMBINES, Layerwise, Random, Rollout, propagate_flops
from ivtp.core.tokens import Tokens
from ivtp.evaluation.profiling import peak_bytes

SIZES = st.fixed_dictionaries(
    {
        "b": st.sampled_from([1, 2, 3]),
        "n": st.sampled_from([5, 13, 63, ROWS, ROWS + 1]),
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
    size, valid = size.to(DEVICE), valid.to(DEVICE)
    bias = None
    if padded or sized:
        bias = size.log().masked_fill(~valid, float("-inf"))
    attentions = []
    for _ in range(layers):
        q = 2 * torch.randn(b, groups * shared, n, e, generator=g).to(DEVICE)
        k, v = (torch.randn(b, groups, n, e, generator=g).to(DEVICE) for _ in range(2))
        attentions.append(Attention(q, k, v, e**-0.5, bias, causal))
    visual = torch.zeros(b, n, dtype=torch.bool, device=DEVICE)
    visual[:, n // 3 : n - 1] = True
    reference = torch.zeros_like(visual)
    if referring == "visual":
        reference = visual.clone()
    else:
        reference[:, n - referring :] = True
    tokens = Tokens.of(torch.zeros(b, n, 2, device=DEVICE), visual, reference, valid=valid)
    maps = [dense_map(a.q, a.k, a.scale, bias, causal) for a in attentions]
    weight = reference.double() / reference.sum(1, keepdim=True)
    index = visual.nonzero()[:, 1].view(b, -1)
    return attentions, tokens, maps, weight, index


def same(actual, expected, tolerance: float = 1e-6):
    """No entry is farther off than `tolerance` of the largest one, on a GPU than what it rounds more."""
    tolerance *= ROUNDING
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{error:.1e} of the largest entry"


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
    norm = dense_value_norm(attentions[-1].v, attentions[-1].q.shape[1]) if value_norm else 1.0
    expected = dense_importance((weight[:, None] @ maps[-1])[:, 0], norm * tokens.valid, visual)
    same(Layerwise(value_norm)(attentions, tokens), expected)


@given(SIZES)
def test_attention_answers_are_those_of_the_dense_map(sizes):
    """rows, propagate, map, value_norm, keys: every way to ask about a map that is never formed."""
    attentions, tokens, maps, _, _ = case(**sizes)
    attention, dense = attentions[0], maps[0]
    b, n = dense.shape[:2]
    g = torch.Generator().manual_seed(1)
    index, w = torch.randint(0, n, (b, 3), generator=g).to(DEVICE), torch.rand(b, n, generator=g).to(DEVICE)
    same(attention.rows(index), dense.gather(1, index[:, :, None].expand(-1, -1, n)))
    same(attention.propagate(w), (w.double()[:, None] @ dense)[:, 0])
    same(attention.map(), dense)
    same(attention.value_norm(), dense_value_norm(attention.v, attention.q.shape[1]))
    same(attention.keys(), attention.k.double().mean(1))
    real = attention.map().sum(2)[tokens.valid]
    torch.testing.assert_close(real, torch.ones_like(real))


PRECISION = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@given(SIZES, st.sampled_from(list(PRECISION)))
def test_narrow_numbers_cost_no_accuracy_beyond_their_own(sizes, dtype):
    """A logit rounded to bfloat16 is off by several per cent of its probability: other tokens would stay."""
    attentions, tokens, *_ = case(**sizes)
    attention = replace(attentions[0], **{name: getattr(attentions[0], name).to(dtype) for name in "qkv"})
    dense = dense_map(attention.q, attention.k, attention.scale, attention.bias, attention.causal)
    w = torch.rand(tokens.size.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    same(attention.propagate(w), (w.double()[:, None] @ dense)[:, 0], PRECISION[dtype])
    last = torch.full((len(w), 1), w.shape[1] - 1, device=DEVICE)
    same(attention.rows(last), dense[:, -1:], PRECISION[dtype])


SUMS = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
on_a_gpu = pytest.mark.skipif(
    DEVICE == "cpu" or PRETENDED,
    reason="Triton compiles for GPUs; test_the_kernels_of_triton_interpreted runs the same kernels here",
)


@on_a_gpu
@given(SIZES, st.sampled_from(list(SUMS)))
def test_fused_kernels_give_the_same_sums(sizes, dtype):
    """Bias, causal masks, shared heads, weights of zero, queries that see nothing, sizes that fill no block."""
    attentions, tokens, *_ = case(**sizes)
    fused_against_dense(attentions[0], tokens, dtype)


def test_the_kernels_of_triton_interpreted():
    """The kernels that score tokens on a GPU, run by Triton's interpreter: without it no CPU would ever see them fail."""
    pytest.importorskip("triton", reason="torch brings Triton on Linux only")
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "JAXTYPING_DISABLE": "1",
        "PYTHONPATH": path,
        "IVTP_TEST_DEVICE": "cpu",
    }
    script = Path(__file__).parents[1] / "helpers" / "interpreted.py"
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"]


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 72, 80, 128])
@pytest.mark.parametrize("n", [129, 577])
def test_fused_sums_of_real_head_widths(n, width, dtype):
    """CLIP's 64, SigLIP's 72, Qwen's 80, Llama's 128: causal or not, shared heads or not, padded and merged or not."""
    for number, (shared, causal, padded) in enumerate(product([1, 4], [False, True], [False, True])):
        attentions, tokens, *_ = case(2, n, 2, shared, width, 1, causal, padded, padded, 1, number)
        fused_against_dense(attentions[0], tokens, dtype)


def fused_against_dense(attention, tokens, dtype):
    """Compare the fused sums of an attention in a number type with those of its dense map in float64."""
    q, k, bias = attention.q.to(dtype), attention.k.to(dtype), attention.bias
    dense = dense_map(q, k, attention.scale, bias, attention.causal)
    w = torch.rand(tokens.size.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    w = w * (w > 0.3)
    low = None if bias is None else bias.clamp_min(-1e3)
    with FlopCounterMode(display=False) as counter:
        sums = column_sums(q, k, w, low, attention.scale, attention.causal)
    expected = (w.double()[:, None] @ dense)[:, 0]
    real = tokens.valid  # what padding gets, Attention hides
    same(sums[real] / q.shape[1], expected[real], SUMS[dtype])
    b, h, n, e = q.shape
    assert counter.get_total_flops() == b * propagate_flops(n, h, e)


@pytest.mark.skipif(PRETENDED, reason="torch's check of operators looks into storage, which a pretended GPU has not")
@pytest.mark.parametrize("sums", [pytest.param(column_sums, marks=on_a_gpu), streamed_sums], ids=["fused", "streamed"])
def test_the_sums_can_be_compiled(sums):
    """Shapes without data, and no argument changed: a captured prefill must not come to grief on a score."""
    attention = case(2, 13, 2, 3, 7, 1, True, True, True, 1, 3)[0][0]
    w, bias = torch.rand(2, 13, device=DEVICE), attention.bias.clamp_min(-1e3)
    torch.library.opcheck(sums, (attention.q, attention.k, w, bias, attention.scale, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=on_a_gpu)])
def test_no_map_is_formed(fused, causal, dtype):
    """At 3000 tokens the map of one head is 36 MB, and of a batch with many heads more than a GPU has."""
    n, heads, groups, width = 3001, 6, 2, 8
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, n, width, generator=g).to(DEVICE, dtype)
    k = torch.randn(1, groups, n, width, generator=g).to(DEVICE, dtype)
    attention = Attention(q, k, k, width**-0.5, torch.zeros(1, n, device=DEVICE), causal)
    w = torch.rand(1, n, device=DEVICE)
    last = torch.tensor([[n - 1]], device=DEVICE)
    sums = (lambda: column_sums(q, k, w, attention.bias, 0.3, causal)) if fused else (lambda: attention.propagate(w))
    assert peak_bytes(sums, DEVICE) < 16e6
    assert peak_bytes(lambda: attention.rows(last), DEVICE) < 1e6
    assert (
        peak_bytes(lambda: attention.rows(torch.arange(n, device=DEVICE)[None, : n // 8]), DEVICE) > 4.5e6
    )  # the test sees what is allocated


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
    together = Random(3)([], noise_tokens(sample, position))
    for i in (2, 0, 1):
        assert torch.equal(Random(3)([], noise_tokens(sample[i : i + 1], position[:1]))[0], together[i])
    assert len({tuple(row.tolist()) for row in together}) == 3
    assert not torch.equal(Random(4)([], noise_tokens(sample, position)), together)


def test_chance_is_uniform_and_draws_anew_at_every_cut():
    """The floor of every table: a biased or repeated draw would make it wrong for all."""
    samples, n = 400, 24
    noise = Random()([], noise_tokens(torch.arange(samples), torch.arange(n).expand(samples, n)))
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(float(noise.mean()) - 0.5) < 0.01
    kept = torch.zeros(n).scatter_add(0, noise.topk(6, 1).indices.flatten(), torch.ones(samples * 6))
    # 100 ± 8.7 expected at each place; 5 standard deviations
    assert (kept - samples / 4).abs().max() < 5 * (samples * 0.25 * 0.75) ** 0.5
    fewer = Random()([], noise_tokens(torch.arange(samples), torch.arange(n - 1).expand(samples, n - 1)))
    correlation = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), fewer.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.05


def test_padding_is_never_kept_before_a_real_token():
    valid = torch.tensor([[False, True, True, False, True]])
    noise = Random()([], noise_tokens(torch.tensor([1]), torch.arange(5)[None], valid))
    assert set(noise.topk(3).indices[0].tolist()) == {1, 2, 4}


def test_an_unknown_combine_says_what_there_is():
    with pytest.raises(ValueError, match="combine='median' is not one of residual, mean, max, multiply"):
        Rollout("median")
