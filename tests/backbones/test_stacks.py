"""Every backbone as a stack: the attention that scores read is the attention that the kernel used."""

import pytest
import torch
from conftest import VISION, close, images, inputs, llava, vision_model
from helpers.reference import dense_map, heads_of
from helpers.towers import mixed_in, stack_of

from ivtp.backbones.language.llama import Llama
from ivtp.core.loop import Stack, traverse
from ivtp.core.tokens import Tokens


def mixed(attention):
    """Each head's map times its values, float64, heads concatenated "b n d": what a kernel hands to the projection."""
    h, g = attention.q.shape[1], attention.k.shape[1]
    heads = [
        dense_map(
            attention.q[:, i : i + 1], attention.k[:, j : j + 1], attention.scale, attention.bias, attention.causal
        )
        @ attention.v[:, j].double()
        for i in range(h)
        for j in [i // (h // g)]
    ]
    return torch.cat(heads, -1).float()


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("backbone", VISION)
def test_vision_records_are_what_the_kernel_saw(backbone, proportional):
    """Queries and keys behind their norms, the right third of a joint projection, scale, padding, log sizes."""
    model = vision_model(backbone)
    stack = stack_of(backbone, model)
    assert isinstance(stack, Stack)
    tokens = stack.embed(images(2))
    n = tokens.x.shape[1]
    size = torch.randint(1, 6, (2, n)).float()
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, 7:12] = False
    tokens = Tokens(**{**vars(tokens), "size": size, "valid": valid, "facts": None})
    for layer in (1, 4):
        x, attention = stack.attend(layer, tokens, proportional)
        close(x, mixed_in(backbone, model, layer, tokens.x, mixed(attention)))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_language_records_are_what_the_kernel_saw(kernel):
    """After RoPE, causal, left-padded, six query heads over two key-value heads."""
    model, batch = llava(kernel).model.language_model, inputs()
    valid = batch["attention_mask"].bool()
    x = model.embed_tokens(batch["input_ids"])
    nothing = torch.zeros_like(valid)
    tokens = Tokens.of(x, nothing, nothing, valid=valid, position=(valid.long().cumsum(1) - 1).clamp_min(0))
    stack = Llama(model)
    assert isinstance(stack, Stack)
    for layer in (0, 5):
        y, attention = stack.attend(layer, tokens, False)
        expected = x + model.layers[layer].self_attn.o_proj(mixed(attention))
        assert attention.v.shape[1] == 2
        assert torch.equal(
            attention.v, heads_of(model.layers[layer].self_attn.v_proj(model.layers[layer].input_layernorm(x)), 2)
        )
        close(y[valid], expected[valid])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_an_unpruned_decoder_is_llama_bit_for_bit(kernel):
    """The loop over opened layers against transformers' own, padded batch, no image, no cache."""
    model, batch = llava(kernel).model.language_model, inputs()
    valid = batch["attention_mask"].bool()
    x, position = model.embed_tokens(batch["input_ids"]), (valid.long().cumsum(1) - 1).clamp_min(0)
    nothing = torch.zeros_like(valid)
    tokens, cuts = traverse(Llama(model), Tokens.of(x, nothing, nothing, valid=valid, position=position))
    expected = model(inputs_embeds=x, attention_mask=batch["attention_mask"], position_ids=position).last_hidden_state
    assert torch.equal(model.norm(tokens.x)[valid], expected[valid])
    assert cuts == []
