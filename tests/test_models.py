"""Loading: one clear line for what is missing or broken, and the embedded model through the README's own lines."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import KEEP, make_clip, make_llava, make_text_encoder, make_timm, word_tokenizer
from PIL import Image
from torch import nn

import ivtp
from ivtp.backbones import ModelError


def refused(source, *words):
    with pytest.raises(ModelError) as error:
        ivtp.load_model(source)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole checkpoint on disk, its paired CLIP text encoder beside it."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPImageProcessor, LlavaProcessor

    folder = tmp_path_factory.mktemp("model")
    make_llava().save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35})
    LlavaProcessor(
        images, word_tokenizer(), patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    encoder = make_text_encoder()
    encoder.model.save_pretrained(folder / "clip")
    encoder.tokenizer.save_pretrained(folder / "clip")
    weights = load_file(folder / "clip" / "model.safetensors")
    save_file(
        {**weights, "visual_projection.weight": encoder.visual_projection},
        folder / "clip" / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def copied(saved, tmp_path):
    import shutil

    return shutil.copytree(saved, tmp_path / "copy")


def test_a_saved_checkpoint_comes_back_with_its_text_encoder(saved):
    model, processor = ivtp.load_model(saved)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    batch = processor(
        images=Image.new("RGB", (50, 40), "red"), text="what <image> color is the cube ?", return_tensors="pt"
    )
    torch.testing.assert_close(model(**batch).logits, make_llava()(**batch).logits)
    shape = ivtp.shape_of(model)
    assert (shape.text.width, shape.text_context, shape.joint) == (20, 19, 13)
    with ivtp.prune(model, "ivtp", keep=KEEP) as run:
        model.generate(**batch, max_new_tokens=2)
    assert [word for word, _ in run.trace.words[0]] == ["what", "color", "is", "the", "cube", "?"]


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused("./nowhere/at/all", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")


def test_a_hub_id_offline_says_so():
    refused("nobody/no-such-model", "nobody/no-such-model", "offline")


def test_pickles_are_never_opened(saved, tmp_path):
    """A checkpoint can run code when unpickled; this one would leave a mark."""
    folder, mark = copied(saved, tmp_path), tmp_path / "opened"

    class Bomb:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "pytorch_model.bin", "pickle", "safetensors")
    assert not mark.exists()
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no *.safetensors weights")


def test_a_truncated_checkpoint(saved, tmp_path):
    weights = copied(saved, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refused(weights.parent, str(weights.parent))


def test_missing_weights_are_not_replaced_by_random_ones(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = copied(saved, tmp_path) / "model.safetensors"
    found = load_file(weights)
    gone = sorted(name for name in found if "layers.3.mlp" in name)[0]
    del found[gone]
    save_file(found, weights, {"format": "pt"})
    refused(weights.parent, "lacks weights", "incomplete")


def test_an_unsupported_family(saved, tmp_path):
    folder = copied(saved, tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(folder, "'bert'", "supported: ", "llava")
    with pytest.raises(ModelError, match="unknown model family"), ivtp.prune(nn.Linear(2, 2), "topk", keep=3):
        pass


@pytest.mark.parametrize("part", ["vision", "text"])
def test_a_llava_of_other_parts_is_refused(part):
    """DINOv2 has registers here, Gemma scales its embeddings: opened as DINOv2 and Llama, they would be silently wrong."""
    from transformers import Dinov2WithRegistersConfig, GemmaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = make_llava().config
    small = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 3}
    if part == "vision":
        vision, text = Dinov2WithRegistersConfig(**small, image_size=35, patch_size=7), config.text_config
    else:
        vision = config.vision_config
        text = GemmaConfig(**{**small, "hidden_size": 24}, num_key_value_heads=1, head_dim=8, vocab_size=30)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=4))
    with pytest.raises(ModelError, match="supported") as error, ivtp.prune(model, "topk", keep=KEEP):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["MistralConfig", "Qwen2Config"])
def test_other_decoders_of_llamas_make(kind):
    """Everything kept: their own logits, bit for bit; with a sliding window: refused."""
    import transformers
    from conftest import inputs, shake

    llama = make_llava().config
    sizes = {
        k: getattr(llama.text_config, k)
        for k in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
        )
    }
    text = getattr(transformers, kind)(**sizes, head_dim=10, sliding_window=None)
    config = transformers.LlavaConfig(vision_config=llama.vision_config, text_config=text, image_token_index=4)
    model = shake(transformers.LlavaForConditionalGeneration(config))
    batch = inputs()
    valid, expected = batch["attention_mask"].bool(), model(**batch).logits
    with ivtp.prune(model, "ivtp", keep=25, reference="last"):
        assert torch.equal(model(**batch).logits[valid], expected[valid])
    if kind == "MistralConfig":
        text.sliding_window = 7
        with pytest.raises(ModelError, match="sliding"), ivtp.prune(model, "topk", keep=KEEP):
            pass


def test_vision_towers_are_pruned_by_the_same_call():
    for model in (make_clip(), make_timm("timm_cls")):
        with ivtp.prune(model, "topk", keep=KEEP) as run:
            model(torch.randn(2, 3, 35, 35))
        assert run.trace.vision[-1].position.shape == (2, KEEP)
        with pytest.raises(ValueError, match="language model"), ivtp.prune(model, "ivtp", keep=KEEP):
            pass
    with pytest.raises(ValueError, match="attn_mask"), ivtp.prune(model, "topk", keep=KEEP):
        model.forward_features(torch.randn(1, 3, 35, 35), attn_mask=torch.zeros(26, 26))
    with pytest.raises(ValueError, match="output_hidden_states"), ivtp.prune(clip := make_clip(), "topk", keep=KEEP):
        clip(torch.randn(1, 3, 35, 35), output_hidden_states=True)


def test_a_model_you_already_have_keeps_its_processor():
    model, processor = make_llava(), SimpleNamespace(tokenizer=word_tokenizer())
    assert ivtp.load_model(model, processor, make_text_encoder()) == (model, processor)
    assert ivtp.shape_of(model).joint == 13


def test_the_embedded_model_runs_the_readmes_lines():
    """Whatever its weights: it loads without a network, answers, and is pruned by the paper's method."""
    model, processor = ivtp.load_model("tiny")
    tokens = ivtp.shape_of(model).patches
    image = Image.linear_gradient("L").convert("RGB")
    words = [w for w in processor.tokenizer.get_vocab() if w.isalpha()][:3]
    prompt = " ".join(["<image>", *words, "?"])
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    with ivtp.prune(model, "ivtp", keep=16) as run:
        pruned = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    assert plain.shape == pruned.shape
    assert run.trace.kept.position.shape == (1, 16)
    assert run.trace.kept.position.max() < tokens
    assert len(run.trace.words[0]) >= len(words)
    with ivtp.prune(model, "ivtp", keep=tokens):
        assert torch.equal(model.generate(**inputs, max_new_tokens=2, min_new_tokens=2), plain)
