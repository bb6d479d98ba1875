"""Sources of checkpoints: a folder or the hub, what each error of a hub says, and what a checkpoint may not hold."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llava, word_tokenizer

import ivtp
from ivtp.backbones import ModelError
from ivtp.backbones.loading.checks import check_device, check_finite, check_sizes, read_config
from ivtp.backbones.loading.encoders import load_encoder
from ivtp.backbones.loading.hub import SMALL, Checkpoint, at_revision, fetch, is_folder

COMMIT = "c" * 40
ANSWERS = {
    "gated": (403, "GatedRepo"),
    "locked": (401, "GatedRepo"),
    "private": (401, None),
    "absent": (404, "RepoNotFound"),
    "moved": (404, "RevisionNotFound"),
    "broken": (500, None),
}
"""Status and error code of every request, by the name of the repository."""


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.split("/api/models/owner/")[-1].split("/")[0].split("?")[0]
        status, code = ANSWERS[name]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def online(endpoint, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    return monkeypatch


def refused(source, *words, revision=None):
    with pytest.raises(ModelError) as error:
        fetch(source, revision, SMALL)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gated", ["owner/gated is gated", "accept its licence at http://127", "hf auth login"]),
        ("locked", ["owner/locked is gated", "hf auth login"]),
        ("private", ["owner/private is neither a folder here nor a repository", "hf auth login"]),
        ("absent", ["owner/absent is neither a folder here nor a repository", "check the spelling"]),
        ("moved", ["owner/moved has no revision 'v2'", "branch, a tag or a whole commit"]),
        ("broken", ["owner/broken", "http://127"]),
    ],
)
def test_an_error_of_the_hub_is_one_line_that_says_what_to_do(online, name, words):
    refused(f"owner/{name}@v2" if name == "moved" else f"owner/{name}", *words)


def test_a_hub_that_cannot_be_reached_is_said_at_once(online):
    """A closed port, and `weights/llava` where no such folder is: no minute of retries."""
    from huggingface_hub import constants

    online.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    refused("weights/llava", "neither a folder here", "http://127.0.0.1:9 cannot be reached", "HF_ENDPOINT")
    assert time.monotonic() - start < 3


def test_offline_is_said():
    refused("owner/name", "owner/name is neither a folder here", "HF_HUB_OFFLINE", "offline, give a local folder")


def test_what_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for source in ("weights/llava", "./a/b", "../x", "/a/b", "~/a", "llava", "a/b/c", "a/b/", "weights"):
        assert is_folder(source), source
    assert not is_folder("llava-hf/llava-1.5-7b-hf")
    refused("weights/llava", "model folder weights/llava does not exist")
    (tmp_path / "weights" / "a@b").mkdir()
    assert at_revision("weights/a@b") == ("weights/a@b", None)  # a name that exists is no revision
    assert at_revision("owner/name@v1") == ("owner/name", "v1")
    assert at_revision("owner/name@v1", "v1") == ("owner/name", "v1")
    refused("weights/a@b", "revision='v1' is for a hub id", revision="v1")


def test_a_folder_of_the_owners_name_hides_the_hub_until_a_revision_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    words = ["was read as a path because a folder 'openai' is here", "write openai/clip@main for the hub's"]
    refused("openai/clip", "model folder openai/clip does not exist", *words)
    for source, revision in (("openai/clip@main", None), ("openai/clip", "main")):
        refused(source, "openai/clip@main is neither a folder here nor, whole, in the cache", revision=revision)
    (tmp_path / "openai" / "clip").mkdir()
    assert fetch("openai/clip", None, SMALL) == Checkpoint("openai/clip", Path("openai/clip"))
    refused("openai/clip", "revision='main' is for a hub id", "is a local folder", revision="main")
    for source in ("./openai/x", "openai/x/y", "x"):  # these are no hub ids in any case
        refused(source, f"model folder {Path(source)} does not exist")


def test_a_home_folder_with_a_sign_of_a_revision_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my tiny@v2").mkdir()
    assert fetch("~/my tiny@v2", None, SMALL).folder == tmp_path / "my tiny@v2"
    refused("~/no@where", f"model folder {tmp_path}/no@where does not exist")
    refused("~nobody-of-this-name/x", "model folder ~nobody-of-this-name/x does not exist")


# What the caller gives


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch):
    def said(device, load=ivtp.load_model, *source):
        with pytest.raises(ModelError) as error:
            load(*(source or ["tiny"]), device=device)
        assert "\n" not in str(error.value)
        return str(error.value)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert said("cuda") == "device='cuda' is not here; here are: cpu"
    assert said("gpu0") == "device='gpu0' is not a device of torch; here are: cpu"
    assert said(1.5).endswith("here are: cpu")
    assert said("cuda", load_encoder, "transformers", "tiny_clip") == "device='cuda' is not here; here are: cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert said("cuda:2") == "device='cuda:2' is not here; here are: cpu, cuda:0, cuda:1"
    assert said("mps").endswith("here are: cpu, cuda:0, cuda:1")
    for device in ("cpu", "cuda", "cuda:1", torch.device("cuda", 0)):
        check_device(device)


def test_an_attention_whose_package_is_missing_is_one_line(monkeypatch):
    """transformers raises ImportError where a package that an attention needs is not installed."""
    from transformers import AutoModelForImageTextToText

    def absent(*_, **__):
        raise ImportError("FlashAttention2 cannot be used: flash_attn is not installed.\nPlease refer to …")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", absent)
    with pytest.raises(ModelError, match=r"cannot load model .*tiny': FlashAttention2 .* is not installed\.$"):
        ivtp.load_model("tiny", attn_implementation="flash_attention_2")


# What a checkpoint holds


def config_folder(tmp_path, config):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return Checkpoint("liuhaotian/llava-v1.5-7b", tmp_path)


@pytest.mark.parametrize(
    ("source", "config", "form"),
    [
        ("liuhaotian/llava-v1.5-13b", {"model_type": "llava_llama"}, "llava-hf/llava-1.5-13b-hf"),
        ("me/mine", {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "llava-hf/llava-1.5-7b-hf"),
        ("liuhaotian/llava-v1.6-mistral-7b", {"model_type": "llava_mistral"}, "llava-hf/llava-v1.6-mistral-7b-hf"),
        ("lmms-lab/llava-onevision-qwen2-0.5b-ov", {"model_type": "llava_qwen"}, "llava-onevision-qwen2-0.5b-ov-hf"),
        ("OpenGVLab/InternVL3-2B", {"model_type": "internvl_chat"}, "OpenGVLab/InternVL3-2B-hf"),
    ],
)
def test_an_original_checkpoint_names_the_form_to_use(source, config, form, tmp_path):
    checkpoint = Checkpoint(source, config_folder(tmp_path, config).folder, COMMIT)
    with pytest.raises(ModelError, match="own format") as error:
        read_config(checkpoint)
    assert str(error.value).endswith(form) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("text_config", {"hidden_size": -42}, "text_config.hidden_size=-42, but it must be a whole number from 1"),
        ("text_config", {"num_attention_heads": 0}, "text_config.num_attention_heads=0"),
        ("text_config", {"num_hidden_layers": 10**9}, "text_config.num_hidden_layers=1000000000"),
        ("text_config", {"num_hidden_layers": 2.5}, "text_config.num_hidden_layers=2.5"),
        ("text_config", {"num_key_value_heads": 4}, "must be a multiple of num_key_value_heads=4"),
        ("vision_config", {"hidden_size": 25}, "must be a multiple of num_attention_heads=3"),
        ("vision_config", {"patch_size": 36}, "vision_config.image_size=35, but it must be at least patch_size=36"),
        ("vision_config", {"image_size": "336"}, "vision_config.image_size='336'"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_built(part, change, says, tmp_path):
    config = make_llava().config.to_dict()
    config[part] |= change
    with pytest.raises(ModelError) as error:
        read_config(config_folder(tmp_path, config))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_sizes_that_models_have_are_not_refused():
    """Every shipped config, and the sizes that transformers itself gives each family."""
    from omegaconf import OmegaConf
    from transformers import AutoConfig

    from ivtp.backbones.family import language_families
    from ivtp.experiment.config import load_config, options

    for name in options("model"):
        check_sizes(name, OmegaConf.to_container(load_config([f"model={name}"]).model))
    for name in (*language_families(), "clip", "siglip"):
        check_sizes(name, AutoConfig.for_model(name).to_dict())


@pytest.mark.parametrize("text", ["", "{", "[]", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_a_damaged_config_is_one_line(text, tmp_path):
    with pytest.raises(ModelError, match=r"config\.json") as error:
        read_config(config_folder(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_named(value, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(dtype)
    check_finite("x", model)
    model[1].weight.data[2, 3] = value
    with pytest.raises(ModelError, match=r"x: weight 1\.weight has NaN or infinite"):
        check_finite("x", model)


def test_a_model_with_such_a_weight_is_not_loaded():
    model = make_llava()
    model.model.language_model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight has NaN"):
        ivtp.load_model(model, SimpleNamespace(tokenizer=word_tokenizer()))


def test_downloads_show_their_bars_and_a_reader_may_turn_them_off():
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from ivtp.experiment.planning import quiet_libraries

    enable_progress_bars()
    quiet_libraries()
    assert not are_progress_bars_disabled()
    disable_progress_bars()
    quiet_libraries()
    assert are_progress_bars_disabled()
    enable_progress_bars()
