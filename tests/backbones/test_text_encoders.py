"""Text encoders from checkpoints: the text half of open_clip's and transformers' CLIPs, and what is refused."""

from __future__ import annotations

import json
import shutil

import open_clip
import pytest
import torch
from conftest import TEXTS, shake
from safetensors.torch import load_file, save_file
from test_encoders import clip_folder

import ivtp
from ivtp.backbones import ModelError
from ivtp.backbones.loading.hub import EMBEDDED
from ivtp.backbones.text.loading import load_text_encoder, open_clip_named, text_source
from ivtp.backbones.text.pairing import text_checkpoint

VISION = {"image_size": 35, "patch_size": 7, "width": 24, "layers": 3, "head_width": 6, "mlp_ratio": 1.5}
TEXT = {"context_length": 19, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
CONFIG = {"embed_dim": 13, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
SPEC = "open_clip:ViT-L-14-336-quickgelu@openai"


def write(folder, config=CONFIG, **changes):
    """A repository as open_clip's `push_to_hf_hub` writes it, and the model."""
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = shake(kind(**{key: value for key, value in config.items() if key != "custom_text"}))
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file({**model.state_dict(), **changes}, folder / "open_clip_model.safetensors")
    return model


def same_as(encoder, model):
    """`encode_text` and the projection of the whole model, at the end mark of each text."""
    tokens = open_clip.SimpleTokenizer(context_length=19)(list(TEXTS))
    torch.testing.assert_close(torch.cat(encoder.embed(TEXTS)), model.encode_text(tokens))
    cls = torch.randn(3, 24)
    assert torch.equal(encoder.project(cls), cls @ model.visual.proj)


@pytest.mark.parametrize("kind", ["quick", "gelu", "custom"])
def test_the_text_half_is_open_clips_own(kind, tmp_path):
    config = CONFIG | {"quick": {}, "gelu": {"quick_gelu": False}, "custom": {"custom_text": True}}[kind]
    model = write(tmp_path / "clip", config)
    encoder = load_text_encoder(str(tmp_path / "clip"))
    same_as(encoder, model)
    assert not any(p.requires_grad for p in encoder.model.parameters())
    sizes = text_source(str(tmp_path / "clip")).sizes()
    assert sizes == {"text": encoder.sizes, "text_context": encoder.context, "joint": encoder.joint}


def test_the_image_tower_is_not_even_read(tmp_path, monkeypatch):
    """A whole CLIP on the device would waste 1.2 GB of a ViT-L in float32."""
    import safetensors

    read, plain = [], safetensors.safe_open

    class Spy:
        def __init__(self, *given):
            self.file = plain(*given)

        def __enter__(self):
            self.open = self.file.__enter__()
            return self

        def __exit__(self, *why):
            return self.file.__exit__(*why)

        def keys(self):
            return self.open.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.open.get_tensor(name)

    write(tmp_path / "clip")
    monkeypatch.setattr(safetensors, "safe_open", Spy)
    encoder = load_text_encoder(str(tmp_path / "clip"))
    assert [name for name in read if name.startswith("visual")] == ["visual.proj"]
    assert not hasattr(encoder.model, "visual")


def test_weights_in_half_precision_are_computed_in_single(tmp_path):
    model = write(tmp_path / "clip")
    file = tmp_path / "clip" / "open_clip_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    encoder = load_text_encoder(str(tmp_path / "clip"))
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    same_as(encoder, model)


def test_transformers_shards_are_read_too(tmp_path):
    """A sharded CLIP has no model.safetensors that could hold the visual projection."""
    model, tokenizer = clip_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    encoder = load_text_encoder(str(tmp_path))
    ids = tokenizer(["is it red ?"], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(encoder.embed(["is it red ?"])[0], model.get_text_features(ids).pooler_output)
    assert torch.equal(encoder.visual_projection, model.visual_projection.weight)


def test_of_both_formats_transformers_is_read_as_before(tmp_path):
    clip_folder(tmp_path)
    write(tmp_path)
    assert text_source(str(tmp_path)).format == "transformers"
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_large_patch14_clip_336"}))  # timm's
    assert text_source(str(tmp_path)).format == "open_clip"


# By name


def test_a_name_with_its_tag_is_found_in_open_clips_table():
    named = open_clip_named(SPEC)
    assert named.repository == "timm/vit_large_patch14_clip_336.openai"
    assert named.weights[0] == "open_clip_model.safetensors"
    assert named.revision is None and named.model["quick_gelu"]
    assert open_clip_named("open_clip:ViT-B-16-quickgelu@openai").repository == "timm/vit_base_patch16_clip_224.openai"
    assert open_clip_named(f"{SPEC}@refs/pr/1").revision == "refs/pr/1"
    assert open_clip_named("open_clip:ViTamin-S@datacomp1b").weights == ["pytorch_model.safetensors"]  # never its .bin


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("open_clip:ViT-L-14-336-quickgelu", f"has no tag, so that its weights would be random; write {SPEC[:-7]}@TAG"),
        ("open_clip:ViT-L-14-336-quickgelu@", "has no tag"),
        ("open_clip:ViT-L-14-336@openai", f"GELU on weights that were trained with QuickGELU; use {SPEC}"),
        ("open_clip:ViT-B-16-quickgelu@openia", "a tag that open_clip does not know; open_clip has of it: openai"),
        ("open_clip:ViT-L-14-366-quickgelu@openai", "Did you mean 'ViT-L-14-336-quickgelu'"),
        ("open_clip:ViT-B-16@openai@main@x", "is not understood"),
        ("open_clip:ViT-B-16-quickgelu@openai@", "is not understood"),
        ("owner/name@a@b", "is not understood"),
        ("owner/name@", "is not understood"),
        ("nowhere/at/all", "model folder nowhere/at/all does not exist"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_in_one_line(source, says):
    with pytest.raises(ModelError) as error:
        load_text_encoder(source)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_path_is_as_good_as_its_text_and_other_objects_are_refused_at_once(tmp_path):
    clip = EMBEDDED["tiny"] / "clip"
    model, _ = ivtp.load_model("tiny", text_encoder=clip)
    with ivtp.prune(model, "ivtp", keep=16):
        assert text_checkpoint(model).folder == clip
    for given, lacking in ((torch.nn.Linear(2, 2), "encode, lengths, project"), (5, "encode"), (True, "encode")):
        with pytest.raises(ModelError, match=f"text_encoder={type(given).__name__} object lacks {lacking}") as error:
            ivtp.load_model("tiny", text_encoder=given)
        assert "\n" not in str(error.value)


def test_one_revision_not_two():
    with pytest.raises(ModelError, match="names revision 'a', but revision='b' is given too"):
        text_source("owner/name@a", "b")
    with pytest.raises(ModelError, match="names revision 'a', but revision='b' is given too"):
        open_clip_named(f"{SPEC}@a", "b")


def test_the_activation_is_the_tags_whatever_a_repository_says(tmp_path, monkeypatch):
    """A repository that open_clip's table lists: its weights' activation is known there."""
    from ivtp.backbones.loading.hub import Checkpoint
    from ivtp.backbones.text import loading as text_encoders

    config = {key: value for key, value in CONFIG.items() if key != "quick_gelu"}
    write(tmp_path / "clip", config)
    whole = write(tmp_path / "expected")  # the same weights with QuickGELU
    name = "timm/vit_large_patch14_clip_336.openai"
    monkeypatch.setattr(text_encoders, "fetch", lambda source, *_: Checkpoint(source, tmp_path / "clip", "0" * 40))
    monkeypatch.setattr(text_encoders, "with_files", lambda checkpoint, _: checkpoint)
    for source in (name, SPEC):
        same_as(load_text_encoder(source), whole)


# What a folder lacks


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_pickles_are_never_a_fallback(kind, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    if kind == "open_clip":
        write(folder)
        (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    else:
        clip_folder(folder)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no \w*model.safetensors; other formats \(pickles\) are never opened"):
        load_text_encoder(str(folder))


def test_what_is_no_clip_is_refused(tmp_path):
    write(tmp_path / "clip")
    shutil.copytree(tmp_path / "clip", tmp_path / "copy")
    file = tmp_path / "copy" / "open_clip_model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if name != "visual.proj"}, file)
    with pytest.raises(ModelError, match=r"has no visual\.proj"):
        load_text_encoder(str(tmp_path / "copy"))
    save_file({name: value for name, value in weights.items() if name != "ln_final.bias"}, file)
    with pytest.raises(ModelError, match=r"lacks weights, e\.g\. ln_final\.bias"):
        load_text_encoder(str(tmp_path / "copy"))
    siglip = CONFIG | {"text_cfg": TEXT | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}}
    (tmp_path / "copy" / "open_clip_config.json").write_text(json.dumps({"model_cfg": siglip}))
    with pytest.raises(ModelError, match="no causal text tower with CLIP's own tokenizer"):
        load_text_encoder(str(tmp_path / "copy"))
    (tmp_path / "copy" / "open_clip_config.json").unlink()
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ModelError, match="is a 'siglip' model; a text encoder is a CLIP"):
        load_text_encoder(str(tmp_path / "copy"))
