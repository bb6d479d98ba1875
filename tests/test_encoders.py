"""Encoders from checkpoints in the formats of timm, open_clip and transformers, and what sorts their images."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, close, shake, siglip_config, text_config, vision_config
from PIL import Image
from safetensors.torch import save_file

import ivtp
from ivtp.backbones import ModelError
from ivtp.backbones.loading.encoders import Encoder, encoder_shape, load_encoder

NAMES = ["red cube", "small thing", "round"]
TEMPLATES = ("what color is the {} ?", "is the {} big ?")


def pictures(count: int = 5):
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (41, 53, 3), dtype=np.uint8)) for _ in range(count)]


def pixels(encoder: Encoder):
    return encoder.image_processor(images=pictures(), return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """As timm's own `save_for_hf` writes what it pushes to the hub: config.json and model.safetensors."""
    import timm
    from timm.models import save_for_hf

    sizes = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
    model = shake(timm.create_model("deit_small_patch16_224", **sizes))
    folder = tmp_path_factory.mktemp("timm")
    settings = {"input_size": (3, 32, 32), "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 1.0}
    model.pretrained_cfg = {**model.pretrained_cfg, **settings}
    save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
    return folder, model


def test_a_timm_checkpoint_gives_the_logits_that_timm_gives(timm_folder):
    """Weights, transform and classifier are those of the folder."""
    from timm.data import create_transform, resolve_model_data_config

    folder, model = timm_folder
    encoder = load_encoder("timm", str(folder))
    encoder.by_classifier(7)
    transform = create_transform(**resolve_model_data_config(model))
    assert list(encoder.image_processor.image_mean) == [0.1, 0.2, 0.3] and encoder.whole
    expected = model(torch.stack([transform(picture) for picture in pictures()]))
    assert torch.equal(encoder.logits(pixels(encoder)), expected)
    with ivtp.prune(encoder.model, "rollout", keep=4):
        assert torch.equal(encoder.logits(pixels(encoder)), expected)
    assert encoder_shape("timm", str(folder)) == ivtp.shape_of(model)


def test_random_weights_are_had_by_name_alone():
    encoder = load_encoder("timm", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False)
    assert encoder.labels == 1000
    assert encoder_shape("timm", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k") == ivtp.shape_of(encoder.model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_opened(timm_folder, tmp_path, name):
    shutil.copytree(timm_folder[0], tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    (tmp_path / "copy" / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/pickled'\ntR.")
    with pytest.raises(ModelError, match=r"has no model.safetensors; other formats \(pickles\) are never opened"):
        load_encoder("timm", str(tmp_path / "copy"))


@pytest.mark.parametrize(
    ("library", "source", "says"),
    [
        ("timm", "./nowhere", "does not exist"),
        ("timm", "timm/deit_small_patch16_224.fb_in1k", "offline, give a local folder"),
        ("open_clip", "laion/nothing-at-all", "offline, give a local folder"),
        ("transformers", "openai/clip-vit-base-patch16", "offline, give a local folder"),
        ("keras", "x", "unknown model.library 'keras'"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(library, source, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=says) as raised:
        load_encoder(library, source)
    assert "\n" not in str(raised.value)


def test_truncated_weights_are_said_in_one_line(timm_folder, tmp_path):
    shutil.copytree(timm_folder[0], tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load model"):
        load_encoder("timm", str(tmp_path / "copy"))


def test_a_classifier_of_other_classes_is_refused(timm_folder):
    encoder = load_encoder("timm", str(timm_folder[0]))
    with pytest.raises(ModelError, match="the data has 10 classes, but the model's classifier has 7"):
        encoder.by_classifier(10)


# Names


def marked_tokenizer():
    """A byte tokenizer that puts begin and end marks around a text, as CLIP's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(pad_token="<end>")
    marks = [("<start>", tokenizer.bos_token_id), ("<end>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=marks)
    return tokenizer


def clip_folder(path):
    """A CLIP of transformers with tokenizer and image processor, as `save_pretrained` writes them."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = marked_tokenizer()
    text = text_config(tokenizer).to_dict()
    config = CLIPConfig(text_config=text, vision_config=vision_config().to_dict(), projection_dim=13)
    model = shake(CLIPModel(config))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35}).save_pretrained(path)
    return model, tokenizer


def siglip_folder(path):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipTextConfig

    tokenizer = marked_tokenizer()
    text = SiglipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=31,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=17,
        projection_size=24,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = shake(SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=siglip_config().to_dict())))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    SiglipImageProcessor(size={"height": 35, "width": 35}).save_pretrained(path)
    return model, tokenizer


@pytest.mark.parametrize("make", [clip_folder, siglip_folder])
def test_names_sort_as_the_model_s_own_forward_ranks_them(make, tmp_path):
    """With one template: the order and the distances of `logits_per_image`, whatever its scale and bias."""
    model, tokenizer = make(tmp_path)
    encoder = load_encoder("transformers", str(tmp_path))
    encoder.by_names(NAMES, TEMPLATES[:1])
    actual = encoder.logits(pixels(encoder))
    siglip = make is siglip_folder
    texts = [TEMPLATES[0].format(name) for name in NAMES]
    ids = tokenizer(
        texts, padding="max_length" if siglip else True, max_length=17, truncation=True, return_tensors="pt"
    )
    given = {"input_ids": ids["input_ids"]} | ({} if siglip else {"attention_mask": ids["attention_mask"]})
    logits = model(**given, pixel_values=pixels(encoder)).logits_per_image
    close(actual, (logits - (model.logit_bias if siglip else 0)) / model.logit_scale.exp())
    assert ivtp.shape_of(encoder.model) == encoder_shape("transformers", str(tmp_path))
    with ivtp.prune(encoder.model, "topk", keep=25):
        assert torch.equal(encoder.logits(pixels(encoder)), actual)
    with ivtp.prune(encoder.model, "topk", keep=3) as run:
        assert not torch.equal(encoder.logits(pixels(encoder)), actual)
    assert run.vision[-1].position.shape == (5, 3)


def test_several_templates_are_averaged_after_each_has_unit_length(tmp_path):
    _, _ = clip_folder(tmp_path)
    encoder = load_encoder("transformers", str(tmp_path))
    alone = []
    for template in TEMPLATES:
        features = encoder.text_features([template.format(name) for name in NAMES])
        alone.append(features / features.norm(dim=-1, keepdim=True))
    names = sum(alone) / 2
    names = names / names.norm(dim=-1, keepdim=True)
    features = encoder.outputs(pixels(encoder))
    encoder.by_names(NAMES, TEMPLATES)
    close(encoder.logits(pixels(encoder)), features / features.norm(dim=-1, keepdim=True) @ names.T)


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """open_clip_config.json and open_clip_model.safetensors, as `push_to_hf_hub` writes them."""
    import open_clip

    vision = {"image_size": 35, "patch_size": 7, "width": 24, "layers": 3, "head_width": 6, "mlp_ratio": 1.5}
    text = {"context_length": 19, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 13, "vision_cfg": vision, "text_cfg": text}
    model = shake(open_clip.CLIP(**config))
    folder = tmp_path_factory.mktemp("open_clip")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder, model


def test_an_open_clip_checkpoint_sorts_by_names_as_open_clip_does(open_clip_folder):
    """Its README's recipe: encode, normalise, multiply; with its own transform and tokenizer."""
    import open_clip

    folder, model = open_clip_folder
    encoder = load_encoder("open_clip", str(folder))
    encoder.by_names(NAMES, TEMPLATES[:1])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([TEMPLATES[0].format(name) for name in NAMES])
    text, image = model.encode_text(tokens, normalize=True), model.encode_image(pixels(encoder), normalize=True)
    actual = encoder.logits(pixels(encoder))
    close(actual, image @ text.T)
    assert encoder.image_processor.image_std == [0.4, 0.5, 0.6]
    with ivtp.prune(encoder.model, "layerwise", keep=25):
        assert torch.equal(encoder.logits(pixels(encoder)), actual)
    assert ivtp.shape_of(encoder.model) == encoder_shape("open_clip", str(folder))


def test_sizes_of_open_clip_are_known_by_its_name_alone(monkeypatch):
    """On torch's meta device: nothing is allocated, nothing is fetched."""
    shape = encoder_shape("open_clip", "ViT-B-16")
    assert (shape.patches, shape.vision.depth, shape.vision.width, shape.classes) == (196, 12, 768, 512)


# Neighbours


def test_the_nearest_images_vote(timm_folder):
    """Each image of the gallery is its own nearest neighbour; of two, the nearer has the greater vote. Who has none comes
    behind, the nearer first: with one neighbour, too, top-5 is the five nearest classes, not the first five of the list."""
    encoder = load_encoder("timm", str(timm_folder[0]))
    labels = torch.tensor([2, 0, 1, 0, 2])
    gallery = encoder.features(pixels(encoder))
    assert gallery.shape == (5, 24)  # in front of the classifier
    encoder.by_neighbours(1, gallery, labels, 3)
    assert torch.equal(encoder.logits(pixels(encoder)).argmax(1), labels)
    encoder.by_neighbours(2, gallery, labels, 3)
    unit = gallery / gallery.norm(dim=1, keepdim=True)
    likeness = unit @ unit.T
    for place, votes in enumerate(encoder.logits(pixels(encoder))):
        best = likeness[place].argsort(descending=True)[:2]
        weight = (likeness[place][best].double() / 0.07).exp()
        expected = torch.zeros(3, dtype=torch.float64)
        for index, share in zip(best.tolist(), (weight / weight.sum()).tolist(), strict=True):
            expected[labels[index]] += share
        close(votes.clamp_min(0), expected.float())
        others = [c for c in range(3) if expected[c] == 0]
        nearest = [float(likeness[place][labels == c].max()) for c in others]
        assert others and votes[others].tolist() == pytest.approx([n - 2 for n in nearest], abs=1e-5)
    encoder.by_neighbours(1, gallery, labels, 4)
    ranked = encoder.logits(pixels(encoder)).argsort(1, descending=True)
    assert (ranked[:, 3] == 3).all(), "a class without images is never likely"
    nearest = torch.stack([likeness[:, labels == c].amax(1) for c in range(3)], 1)
    assert torch.equal(ranked[:, :3], nearest.argsort(1, descending=True))


def dinov2_folder(path):
    """As facebook/dinov2-small is: weights for a larger grid than the processor makes."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 63, "patch_size": 7}
    model = shake(Dinov2Model(Dinov2Config(**sizes)), 11)
    model.save_pretrained(path)
    BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 35, "width": 35}).save_pretrained(path)
    return model


def test_a_dinov2_of_transformers_is_what_it_is_on_images_of_its_processor_s_size(tmp_path):
    """Position embeddings are resized once: features are the model's own, and shares are of the tokens that there are."""
    model = dinov2_folder(tmp_path)
    encoder = load_encoder("transformers", str(tmp_path))
    assert pixels(encoder).shape[2:] == (35, 35) and not encoder.whole
    expected = model(pixels(encoder)).pooler_output
    close(encoder.features(pixels(encoder)), expected)
    shape = ivtp.shape_of(encoder.model)
    assert shape == encoder_shape("transformers", str(tmp_path)) and shape.patches == 25
    with pytest.raises(ModelError, match="has no classifier"):
        encoder.by_classifier(10)
    encoder.by_neighbours(1, encoder.features(pixels(encoder)), torch.arange(5), 5)
    with ivtp.prune(encoder.model, "rollout", keep=25):
        assert encoder.logits(pixels(encoder)).argmax(1).tolist() == [0, 1, 2, 3, 4]
    with ivtp.prune(encoder.model, "rollout", keep=5) as run:
        encoder.logits(pixels(encoder))
    assert run.vision[-1].position.shape == (5, 5)
    with pytest.raises(ValueError, match="without bool_masked_pos"), ivtp.prune(encoder.model, "rollout", keep=5):
        encoder.model(pixels(encoder), bool_masked_pos=torch.zeros(5, 25, dtype=torch.bool))


# The embedded one


def test_the_embedded_clip_names_drawings_before_photographs():
    """A real model and real images, without network: the name among the five likeliest, far above the 1.1 % of chance."""
    from ivtp.data.images import emoji

    encoder = load_encoder("transformers", "tiny_clip")
    data = emoji(324, ["noto", "fluent-3d"], 4, "photo")
    encoder.by_names(data.classes, ["a {}"])
    some = [data[place] for place in range(0, len(data), 12)]
    seen = encoder.image_processor(images=[sample["image"] for sample in some], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([sample["label"] for sample in some])
    assert (encoder.logits(seen).topk(5, 1).indices == labels[:, None]).any(1).float().mean() > 0.3
    assert encoder_shape("transformers", "tiny_clip") == ivtp.shape_of(encoder.model)
