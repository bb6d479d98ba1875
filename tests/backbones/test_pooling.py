"""What pools the patches that are left does not read the padding of a method that keeps fewer of some images."""

import pytest
import torch
from conftest import close, images, vision_model
from towers import answers, pooled, prefix

import ivtp
from ivtp.backbones import ModelError

POOLED = ["siglip_sdpa", "timm_avg", "timm_map", "timm_eva02", "timm_eva_mixed"]


@pytest.mark.parametrize("backbone", POOLED)
def test_padding_is_not_pooled(backbone):
    model, pixels = vision_model(backbone), images(5)
    plan = ivtp.load_pruner("prumerge", ivtp.shape_of(model), keep=11, adaptive=True)
    with ivtp.prune(model, plan) as run:
        states, heads = answers(backbone, model, pixels)
    real = run.vision[-1].valid
    assert real.sum(1).min() < 11, "every image kept all it might: nothing is tested"
    for state, head, places in zip(states, heads, real, strict=True):
        places = torch.cat([torch.ones(prefix(backbone, model), dtype=torch.bool), places])
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


def test_class_and_register_tokens_are_averaged_only_where_the_model_does():
    """timm's `pool_include_prefix`: padding must become the mean over the same tokens that are averaged."""
    from conftest import make_timm

    model = make_timm("timm_registers")
    model.global_pool, model.pool_include_prefix = "avg", True
    plan = ivtp.load_pruner("prumerge", ivtp.shape_of(model), keep=11, adaptive=True)
    with ivtp.prune(model, plan) as run:
        states, heads = answers("timm_registers", model, images(5))
    real = run.vision[-1].valid
    assert real.sum(1).min() < 11
    for state, head, places in zip(states, heads, real, strict=True):
        places = torch.cat([torch.ones(3, dtype=torch.bool), places])
        close(head, model.forward_head(state[places][None])[0])


def test_a_timm_model_that_would_have_to_be_opened_otherwise_is_refused_in_words():
    """Never pruned in part, never counted wrong."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    sizes = {"img_size": 14, "patch_size": 7, "embed_dim": 6, "depth": 2, "num_heads": 1, "num_classes": 3}
    unfused, gated = VisionTransformer(**sizes), Eva(**sizes)
    unfused.blocks[1].attn.fused_attn = False
    gated.blocks[1].attn.gate = torch.nn.Linear(6, 6)
    for model, says in (
        (VisionTransformer(**sizes, block_fn=ParallelScalingBlock), "ParallelScalingBlock cannot be opened"),
        (Eva(**sizes, use_post_norm=True), "EvaBlockPostNorm cannot be opened"),
        (unfused, "TIMM_FUSED_ATTN"),
        (gated, "with a gate"),
    ):
        with pytest.raises(ModelError, match=says), ivtp.prune(model, "random", keep=1):
            pass
