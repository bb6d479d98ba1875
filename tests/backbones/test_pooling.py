"""What pools the patches that are left does not read the padding of a method that keeps fewer of some images."""

import pytest
import torch
from conftest import close, images, vision_model
from towers import answers, pooled

import ivtp

POOLED = ["siglip_sdpa", "timm_avg"]


@pytest.mark.parametrize("backbone", POOLED)
def test_padding_is_not_pooled(backbone):
    model, pixels = vision_model(backbone), images(5)
    plan = ivtp.load_pruner("prumerge", ivtp.shape_of(model), keep=11, adaptive=True)
    with ivtp.prune(model, plan) as run:
        states, heads = answers(backbone, model, pixels)
    real = run.vision[-1].valid
    assert real.sum(1).min() < 11, "every image kept all it might: nothing is tested"
    for state, head, places in zip(states, heads, real, strict=True):
        close(head, pooled(backbone, model, state[places][None])[0])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_siglip_tower_without_head_pools_nothing(kernel):
    """Towers inside language-vision models have none, and their cost has none either."""
    from conftest import siglip_config
    from transformers import SiglipVisionModel

    model = SiglipVisionModel._from_config(siglip_config(vision_use_head=False), attn_implementation=kernel).eval()
    shape = ivtp.shape_of(model.config)
    assert shape.pool is None and not shape.has_cls and shape.prefix == 0
    with ivtp.prune(model, ivtp.load_pruner("layerwise", shape, keep=3)):
        out = model(images(2))
    assert out.pooler_output is None
    assert out.last_hidden_state.shape == torch.Size([2, 3, 24])
