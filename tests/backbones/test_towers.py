"""What pools the patches that are left does not read the padding of a method that keeps fewer of some images."""

import pytest
import torch
from conftest import close, images, vision_model
from helpers.towers import answers, pooled, prefix

import ivtp
from ivtp.backbones import ModelError

POOLED = ["siglip_sdpa", "timm_avg", "timm_map", "timm_eva02", "timm_eva_mixed", "openclip_avg", "openclip_mean"]


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


def test_an_open_clip_tower_that_would_have_to_be_opened_otherwise_is_refused_in_words():
    from open_clip.transformer import VisionTransformer

    sizes = {"image_size": 14, "patch_size": 7, "width": 8, "layers": 2, "heads": 2, "mlp_ratio": 2, "output_dim": 4}
    sequence_first = VisionTransformer(**sizes)
    sequence_first.transformer.batch_first = False
    for model, says in (
        (VisionTransformer(**sizes, qk_norm=True), "CustomResidualAttentionBlock cannot be opened"),
        (VisionTransformer(**sizes, attentional_pool=True, attn_pooler_heads=2), "CoCa"),
        (sequence_first, "batch_first=True"),
    ):
        with pytest.raises(ModelError, match=says), ivtp.prune(model, "random", keep=1):
            pass


def test_a_small_image_in_open_clip_has_the_position_embeddings_that_open_clip_would_load():
    """`downsample` against a tower of that size, given the same checkpoint by open_clip's own resizing."""
    from conftest import make_open_clip
    from open_clip.model import resize_pos_embed
    from open_clip.transformer import VisionTransformer

    model, pixels = make_open_clip("tok"), images(2)
    plan = ivtp.load_pruner("downsample", ivtp.shape_of(model), keep=9)
    sizes = {
        "image_size": 21,
        "patch_size": 7,
        "width": 24,
        "layers": 7,
        "mlp_ratio": 1.5,
        "output_dim": 13,
        "heads": 4,
    }
    small = torch.nn.Module()
    small.visual = VisionTransformer(**sizes).eval()
    weights = {f"visual.{name}": value for name, value in model.state_dict().items()}
    resize_pos_embed(weights, small)
    small.load_state_dict(weights)
    expected = small.visual(torch.nn.functional.interpolate(pixels, (21, 21), mode="bicubic", antialias=True))
    before = model(pixels)
    with ivtp.prune(model, plan) as run:
        close(model(pixels), expected)
    assert run.vision[-1].position[0].tolist() == [0, 2, 4, 10, 12, 14, 20, 22, 24]
    assert torch.equal(model(pixels), before)


def test_a_timm_tower_inside_open_clip_is_pruned_as_timms():
    """open_clip's SigLIP and EVA models are timm's; the projection behind them counts too."""
    import open_clip
    from core.test_cost import agree, counted

    from ivtp.core.flops import cost

    vision = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
    text = {"context_length": 7, "vocab_size": 11, "width": 8, "heads": 2, "layers": 1}
    model = open_clip.CustomTextCLIP(5, vision, text).eval().requires_grad_(False)
    pixels = torch.randn(2, 3, 224, 224)
    expected = model.encode_image(pixels)
    with ivtp.prune(model, "rollout", keep=196):
        assert torch.equal(model.encode_image(pixels), expected)
    plan = ivtp.load_pruner("topk", ivtp.shape_of(model), keep=20)
    with ivtp.prune(model, plan) as run:
        assert not torch.equal(model.encode_image(pixels), expected)
    assert run.vision[-1].position.shape == (2, 20)
    agree(
        counted(model, plan, lambda: model.encode_image(pixels[:1]), "vision"),
        cost(ivtp.shape_of(model), plan, streamed=True),
    )
