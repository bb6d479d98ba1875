"""Packed weights: the same model, only that its products are others; nothing of pruning may notice."""

from copy import deepcopy

import pytest
import torch
from conftest import close
from helpers.families import FAMILIES, TEXTS, batch, family
from torch import nn

import ivtp
from ivtp.backbones.hooks.packed_linear import AVAILABLE, PackedLinear, pack
from ivtp.backbones.text.pairing import guide_for
from ivtp.evaluation.profiling import flop_counter
from ivtp.registry import UserError

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this build of torch has no oneDNN, and pack says so")


def generated(model, inputs, **settings):
    """Logits of three tokens, and the trace."""
    with ivtp.prune(model, "fastv", keep=9, **settings) as run:
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(out.logits, 1), run.trace


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_answers_as_before(kind):
    """A layer that is read by another way than being called would fail; one whose bias is lost would answer otherwise."""
    inputs, model = batch(kind), deepcopy(family(kind)[0])
    expected, trace = generated(model, inputs)
    linears = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    pack(model)
    assert [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)] == linears
    logits, found = generated(model, inputs)
    close(logits, expected)
    for cut, other in zip(found.language, trace.language, strict=True):
        assert torch.equal(cut.position, other.position)


def test_keeping_everything_is_the_packed_model_to_the_bit():
    model, inputs = pack(deepcopy(family("llava")[0])), batch("llava")
    with ivtp.prune(model, "none"):
        kept = model(**inputs).logits
    assert torch.equal(kept[:, -1], model(**inputs).logits[:, -1])


def test_flops_are_counted_as_before():
    """`measure=true` would count nothing, and every comparison with the closed form would fail."""
    model, inputs = deepcopy(family("llava")[0]), batch("llava")
    counts = []
    for _ in range(2):
        with flop_counter() as counter, torch.inference_mode():
            model(**inputs)
        counts.append(counter.get_total_flops())
        if len(counts) == 1:
            pack(model)
    assert counts[0] == counts[1] > 0


def test_the_text_encoder_of_a_loaded_model_is_packed_with_it():
    """It runs once per question, on few tokens: left as it is, it would be most of what guidance costs."""
    model, _ = ivtp.load_model("tiny", pack=True)
    assert isinstance(model.lm_head, PackedLinear)
    encoder = guide_for(model).encoder.model
    kinds = {type(layer) for layer in encoder.modules() if isinstance(layer, nn.Linear)}
    assert kinds == {PackedLinear}


def test_what_cannot_be_packed_is_said():
    with pytest.raises(
        UserError, match="pack=true: weights in bfloat16 on cpu; float32 weights on a CPU can be packed"
    ):
        pack(nn.Linear(5, 3, dtype=torch.bfloat16))
    with pytest.raises(UserError, match="pack=true: no linear layers"):
        pack(nn.Conv2d(3, 5, 3))
    model = pack(deepcopy(family("llava")[0]))
    with (
        pytest.raises(ValueError, match=r"torch\.compile cannot read packed weights; load the model without pack"),
        ivtp.prune(model, "fastv", keep=9, instruction=list(TEXTS)) as run,
    ):
        run.compile()
