"""Tiny random checkpoints with the files, key names and configs of the real ones on the hub."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from conftest import shake

from helpers.hub.server import Files, Hub

CROPS = [[98, 196], [196, 98], [196, 196], [294, 98], [98, 294]]
CLIP_TOWER = {
    "hidden_size": 24,
    "image_size": 98,
    "intermediate_size": 37,
    "model_type": "clip_vision_model",
    "num_attention_heads": 3,
    "num_hidden_layers": 7,
    "patch_size": 14,
    "projection_dim": 13,
    "vocab_size": 32000,
}
DECODER = {
    "hidden_size": 48,
    "intermediate_size": 53,
    "num_attention_heads": 4,
    "num_hidden_layers": 9,
    "num_key_value_heads": 4,
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
OLD = ((r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."))
"""How transformers before 4.52 named the weights of LLaVA and its relatives, which is how the hub has them."""
OLD_LLAVA = (*OLD, (r"^model\.vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."), (r"^model\.", ""))
OLD_INTERNVL = (*OLD, (r"^model\.", ""))


def as_json(**content) -> bytes:
    return json.dumps(content, indent=2).encode()


# Tokenizers --------------------------------------------------------------------------------------------------------


@cache
def corpus() -> tuple[str, ...]:
    from ivtp.data.scenes2 import make_scene

    questions = [q.text for i in range(8) for q in make_scene("test", i)[1]]
    around = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    around += "and polite answers to the human's questions. USER: Answer the question using a single word or phrase. ASSISTANT:"
    return (*questions, *[around, "Yes No yes no user assistant system You are a helpful assistant."] * 4)


@cache
def llama_tokenizer() -> Files:
    """SentencePiece pieces with byte fallback, as converted for Llama: 32000 of them, then `<image>` and `<pad>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = [chr(i) for i in range(33, 127)] + ["▁"]
    raw.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(raw.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += sorted(learned["vocab"], key=learned["vocab"].get)
    pieces += [f"▁unused{i}" for i in range(32000 - len(pieces))]  # as many as the real one has
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learned["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    marks = [AddedToken(mark, normalized=False, special=True) for mark in ("<unk>", "<s>", "</s>", "<image>", "<pad>")]
    made.add_special_tokens(marks)
    ids = {mark.content: made.token_to_id(mark.content) for mark in marks}
    assert (ids["<image>"], ids["<pad>"]) == (32000, 32001)
    known = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = as_json(
        add_bos_token=True,
        add_eos_token=False,
        added_tokens_decoder={str(i): {"content": mark, **known} for mark, i in ids.items()},
        bos_token="<s>",
        clean_up_tokenization_spaces=False,
        eos_token="</s>",
        legacy=True,
        model_max_length=1000000000000000019884624838656,
        pad_token="<pad>",
        padding_side="left",
        processor_class="LlavaProcessor",
        sp_model_kwargs={},
        tokenizer_class="LlamaTokenizer",
        trust_remote_code=False,
        unk_token="<unk>",
        use_default_system_prompt=False,
    )
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": settings,
        "special_tokens_map.json": as_json(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"),
        "added_tokens.json": as_json(**{"<image>": 32000, "<pad>": 32001}),
    }


QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
              "<|image_pad|>", "<|video_pad|>", "<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>")  # fmt: skip


@cache
def qwen_tokenizer(processor: str, **named: str) -> Files:
    """Byte pairs in Qwen's way, with the marks of all families that are built on it; `named`: attributes of some."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(corpus(), trainer)
    learned = json.loads(made.to_str())["model"]
    made.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in QWEN_MARKS])
    ids = {mark: made.token_to_id(mark) for mark in QWEN_MARKS}
    known = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = as_json(
        add_prefix_space=False,
        added_tokens_decoder={str(i): {"content": mark, **known} for mark, i in ids.items()},
        additional_special_tokens=[*QWEN_MARKS[1:]],
        bos_token=None,
        clean_up_tokenization_spaces=False,
        eos_token="<|im_end|>",
        errors="replace",
        model_max_length=131072,
        pad_token="<|endoftext|>",
        processor_class=processor,
        split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer",
        unk_token=None,
        **({"extra_special_tokens": named} if named else {}),
    )
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": settings,
        "vocab.json": as_json(**learned["vocab"]),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(merge) for merge in learned["merges"])]).encode(),
    }


def token_ids(files: Files) -> dict[str, int]:
    """Every token of a repository → its id."""
    made = json.loads(files["tokenizer.json"])
    return made["model"]["vocab"] | {token["content"]: token["id"] for token in made["added_tokens"]}


YES, NO = ("Yes", "▁Yes"), ("No", "▁No")

# Weights -----------------------------------------------------------------------------------------------------------


def weights(files: Files, seed: int, names: Sequence[tuple[str, str]] = ()) -> Files:
    """Random weights for the config of a repository, in three shards with an index.

    names  (pattern, replacement): from the names in today's transformers to those of the real checkpoint
    """
    from safetensors.torch import save
    from transformers import AutoConfig, AutoModelForImageTextToText

    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(files["config.json"])
        config = AutoConfig.from_pretrained(folder)
    dtype = config.dtype or config.text_config.dtype
    with torch.random.fork_rng():
        model = shake(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), seed)
    short_answers(model, token_ids(files))
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    for pattern, replacement in names:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    order, made, place, shards = sorted(tensors), {}, {}, 3
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = order[number * len(order) // shards : (number + 1) * len(order) // shards]
        made[name] = save({key: tensors[key] for key in part}, {"format": "pt"})
        place.update(dict.fromkeys(part, name))
    size = sum(tensor.nbytes for tensor in tensors.values())
    return made | {"model.safetensors.index.json": as_json(metadata={"total_size": size}, weight_map=place)}


def short_answers(model, known: dict[str, int]) -> None:
    """Answer with "Yes" or "No", opposite rows of the head, as the image gives; what follows is the end."""
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    ends, yes, no = [[known[t] for t in tokens if t in known] for tokens in (("</s>", "<|im_end|>"), YES, NO)]
    likely, end = 60 * head[yes[0]], head[ends[0]].sign()
    head *= 0.01
    head[yes], head[no], head[ends] = likely, -likely, 8 * end
    words[[*yes, *no]] = 50 * end


class Bomb:
    """Leaves a mark when its pickle is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def bomb(mark: Path) -> bytes:
    return pickle.dumps(Bomb(mark))


# Checkpoints -------------------------------------------------------------------------------------------------------

LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for "
    "content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}"
    "{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def qwen_chat(image: str) -> str:
    """Qwen's turns, with what stands for an image."""
    return (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
        "{{ '"
        + image
        + "' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def clip_images(processor: str, kind: str, **more) -> Files:
    """Shortest edge to the tower's side, then a centre crop, as CLIP itself; and how many tokens an image has."""
    size = {"height": 98, "width": 98}
    return {
        "preprocessor_config.json": as_json(
            crop_size=size, do_center_crop=True, do_convert_rgb=True, do_normalize=True, do_rescale=True, do_resize=True,
            image_mean=MEAN, image_processor_type=kind, image_std=STD, processor_class=processor, resample=3,
            rescale_factor=1 / 255, size={"shortest_edge": 98}, **more,
        ),
        "processor_config.json": as_json(
            image_token="<image>", num_additional_image_tokens=1, patch_size=14, processor_class=processor,
            vision_feature_select_strategy="default",
        ),
    }  # fmt: skip


def llava(seed: int, architecture: str, kind: str, images: Files, tower: dict | None = None, **more) -> Files:
    """The configs in LLaVA's old form around Vicuna: float16, a vocabulary padded to 32064 rows."""
    vicuna = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
        "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064, **DECODER,
    }  # fmt: skip
    config = as_json(
        architectures=[architecture], ignore_index=-100, image_token_index=32000, model_type=kind, pad_token_id=32001,
        projector_hidden_act="gelu", text_config=vicuna, tie_word_embeddings=False, torch_dtype="float16",
        transformers_version="4.36.0.dev0", vision_config=CLIP_TOWER | (tower or {}), vision_feature_layer=-2,
        vision_feature_select_strategy="default", vocab_size=32064, **more,
    )  # fmt: skip
    files = (
        images | llama_tokenizer() | {"config.json": config, "chat_template.json": as_json(chat_template=LLAVA_CHAT)}
    )
    files["generation_config.json"] = as_json(
        _from_model_config=True, bos_token_id=1, eos_token_id=2, pad_token_id=32001
    )
    return files | weights(files, seed, OLD_LLAVA)


def llava_1_5(seed: int = 1, **tower: int) -> Files:
    """llava-hf/llava-1.5-7b-hf, or somebody's own with a tower of other sizes."""
    images = clip_images("LlavaProcessor", "CLIPImageProcessor")
    return llava(seed, "LlavaForConditionalGeneration", "llava", images, tower, image_seq_length=49)


def llava_next() -> Files:
    """llava-hf/llava-v1.6-vicuna-7b-hf: crops, a learned newline."""
    crops = {"image_grid_pinpoints": CROPS}
    images = clip_images("LlavaNextProcessor", "LlavaNextImageProcessor", aspect_ratio_setting="anyres", **crops)
    more = crops | {"use_image_newline_parameter": True}
    return llava(2, "LlavaNextForConditionalGeneration", "llava_next", images, **more)


def qwen_decoder(files: Files, **more) -> dict:
    ids = token_ids(files)
    return {
        **DECODER, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "vocab_size": 700, "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"], **more,
    }  # fmt: skip


def qwen_generation(files: Files) -> Files:
    ids = token_ids(files)
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    return {"generation_config.json": as_json(do_sample=True, eos_token_id=ends, pad_token_id=ends[1], temperature=0.1)}


def llava_onevision() -> Files:
    """llava-hf/llava-onevision-qwen2-7b-ov-hf: SigLIP, crops in 36 shapes of up to 6 × 6."""
    files = qwen_tokenizer("LlavaOnevisionProcessor")
    ids, side = token_ids(files), 70
    shapes = [[side * high, side * wide] for high in range(1, 7) for wide in range(1, 7)]
    text = qwen_decoder(files, architectures=["Qwen2ForCausalLM"], model_type="qwen2", torch_dtype="bfloat16")
    tower = {name: CLIP_TOWER[name] for name in CLIP_TOWER if name not in ("projection_dim", "vocab_size")}
    tower |= {"image_size": side, "model_type": "siglip_vision_model", "vision_use_head": False}
    scaled = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
    scaled |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    scaled |= {"processor_class": "LlavaOnevisionProcessor", "size": {"height": side, "width": side}}
    files = files | qwen_generation(files) | {
        "config.json": as_json(
            architectures=["LlavaOnevisionForConditionalGeneration"], ignore_index=-100, image_grid_pinpoints=shapes,
            image_token_index=ids["<image>"], model_type="llava_onevision", projector_hidden_act="gelu", text_config=text,
            tie_word_embeddings=False, torch_dtype="float16", use_image_newline_parameter=True,
            video_token_index=ids["<video>"], vision_aspect_ratio="anyres_max_9", vision_config=tower,
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        ),
        "preprocessor_config.json": as_json(
            image_grid_pinpoints=shapes, image_processor_type="LlavaOnevisionImageProcessor", do_pad=True, **scaled
        ),
        "video_processor/preprocessor_config.json": as_json(
            image_processor_type="LlavaOnevisionVideoProcessor", **scaled
        ),
        "processor_config.json": as_json(
            image_token="<image>", num_image_tokens=25, processor_class="LlavaOnevisionProcessor",
            video_token="<video>", vision_feature_select_strategy="full",
        ),
        "chat_template.json": as_json(chat_template=qwen_chat("<image>\n")),
    }  # fmt: skip
    return files | weights(files, 3, OLD_LLAVA)


def qwen_images(processor: str, patch: int, kind: str = "Qwen2VLImageProcessor", **size) -> bytes:
    return as_json(
        image_mean=MEAN, image_processor_type=kind, image_std=STD, merge_size=2, patch_size=patch, processor_class=processor,
        temporal_patch_size=2, **size,
    )  # fmt: skip


def qwen2_5_vl() -> Files:
    """Qwen/Qwen2.5-VL-7B-Instruct: the language model's sizes at the top of its config, not in `text_config`."""
    files = qwen_tokenizer("Qwen2_5_VLProcessor")
    ids = token_ids(files)
    tower = {
        "depth": 7, "fullatt_block_indexes": [2, 5], "hidden_act": "silu", "hidden_size": 24, "in_chans": 3,
        "intermediate_size": 37, "num_heads": 3, "out_hidden_size": 48, "patch_size": 14, "spatial_merge_size": 2,
        "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 56,
    }  # fmt: skip
    files = files | qwen_generation(files) | {
        "config.json": as_json(
            **qwen_decoder(files), architectures=["Qwen2_5_VLForConditionalGeneration"], attention_dropout=0.0,
            hidden_act="silu", image_token_id=ids["<|image_pad|>"], initializer_range=0.02, max_window_layers=9,
            model_type="qwen2_5_vl", rope_scaling={"mrope_section": [2, 2, 2], "type": "mrope"}, sliding_window=32768,
            tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.41.2", use_cache=True,
            use_sliding_window=False, video_token_id=ids["<|video_pad|>"], vision_config=tower,
            vision_end_token_id=ids["<|vision_end|>"], vision_start_token_id=ids["<|vision_start|>"],
            vision_token_id=ids["<|vision_pad|>"],
        ),
        "preprocessor_config.json": qwen_images("Qwen2_5_VLProcessor", 14, max_pixels=12845056, min_pixels=3136),
        "chat_template.json": as_json(chat_template=qwen_chat("<|vision_start|><|image_pad|><|vision_end|>")),
    }  # fmt: skip
    old = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
    return files | weights(files, 4, old)


def qwen3_vl() -> Files:
    """Qwen/Qwen3-VL-8B-Instruct."""
    files = qwen_tokenizer("Qwen3VLProcessor")
    ids = token_ids(files)
    tower = {
        "deepstack_visual_indexes": [1, 3], "depth": 7, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 24,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 37, "model_type": "qwen3_vl", "num_heads": 3,
        "num_position_embeddings": 49, "out_hidden_size": 48, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    rope = {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"}
    text = qwen_decoder(files, model_type="qwen3_vl_text", rope_scaling=rope, head_dim=12, attention_bias=False,
                        dtype="bfloat16", hidden_act="silu", use_cache=True)  # fmt: skip
    pixels = {"longest_edge": 16777216, "shortest_edge": 65536}
    files = files | qwen_generation(files) | {
        "config.json": as_json(
            architectures=["Qwen3VLForConditionalGeneration"], image_token_id=ids["<|image_pad|>"], model_type="qwen3_vl",
            text_config=text, tie_word_embeddings=False, transformers_version="4.57.0.dev0",
            video_token_id=ids["<|video_pad|>"], vision_config=tower, vision_end_token_id=ids["<|vision_end|>"],
            vision_start_token_id=ids["<|vision_start|>"],
        ),
        "preprocessor_config.json": qwen_images("Qwen3VLProcessor", 16, "Qwen2VLImageProcessorFast", size=pixels),
        "video_preprocessor_config.json": as_json(
            image_mean=[0.5] * 3, image_std=[0.5] * 3, merge_size=2, patch_size=16, processor_class="Qwen3VLProcessor",
            size={"longest_edge": 25165824, "shortest_edge": 4096}, temporal_patch_size=2,
            video_processor_type="Qwen3VLVideoProcessor",
        ),
        "chat_template.json": as_json(chat_template=qwen_chat("<|vision_start|><|image_pad|><|vision_end|>")),
    }  # fmt: skip
    return files | weights(files, 5)


def internvl() -> Files:
    """OpenGVLab/InternVL3-8B-hf: crops of one side and a thumbnail, old names."""
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}  # fmt: skip
    files = qwen_tokenizer("InternVLProcessor", **marks)
    side = 196
    tower = {
        "architectures": ["InternVisionModel"], "attention_bias": True, "hidden_act": "gelu", "hidden_size": 24,
        "image_size": [side, side], "intermediate_size": 37, "layer_norm_eps": 1e-06, "model_type": "internvl_vision",
        "norm_type": "layer_norm", "num_attention_heads": 3, "num_channels": 3, "num_hidden_layers": 7,
        "patch_size": [14, 14], "use_absolute_position_embeddings": True, "use_mask_token": False,
        "use_mean_pooling": True, "use_qk_norm": False,
    }  # fmt: skip
    text = qwen_decoder(files, architectures=["Qwen2ForCausalLM"], model_type="qwen2", torch_dtype="bfloat16")
    files = files | qwen_generation(files) | {
        "config.json": as_json(
            architectures=["InternVLForConditionalGeneration"], downsample_ratio=0.5, image_seq_length=49,
            image_token_id=token_ids(files)["<IMG_CONTEXT>"], model_type="internvl", projector_hidden_act="gelu",
            text_config=text, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.52.0.dev0",
            vision_config=tower,
            vision_feature_layer=-1, vision_feature_select_strategy="default",
        ),
        "preprocessor_config.json": as_json(
            crop_size=None, crop_to_patches=False, data_format="channels_first", default_to_square=True,
            do_center_crop=None, do_convert_rgb=True, do_normalize=True, do_rescale=True, do_resize=True,
            image_mean=[0.485, 0.456, 0.406], image_processor_type="GotOcr2ImageProcessorFast",
            image_std=[0.229, 0.224, 0.225], max_patches=12, min_patches=1, processor_class="InternVLProcessor", resample=3,
            rescale_factor=1 / 255, size={"height": side, "width": side},
        ),
        "processor_config.json": as_json(image_seq_length=49, processor_class="InternVLProcessor"),
        "chat_template.jinja": qwen_chat("<IMG_CONTEXT>\n").encode(),
    }  # fmt: skip
    return files | weights(files, 6, OLD_INTERNVL)


# CLIP, twice -------------------------------------------------------------------------------------------------------


def clip_of_transformers(mark: Path) -> Files:
    """openai/clip-vit-large-patch14-336: its weights are a pickle, and nothing else."""
    text = {"hidden_size": 20, "intermediate_size": 31, "model_type": "clip_text_model", "num_attention_heads": 5,
            "num_hidden_layers": 3, "projection_dim": 13}  # fmt: skip
    return {
        "config.json": as_json(
            architectures=["CLIPModel"], initializer_factor=1.0, logit_scale_init_value=2.6592, model_type="clip",
            projection_dim=13, text_config=text, torch_dtype="float32", transformers_version=None,
            vision_config=CLIP_TOWER,
        ),
        "preprocessor_config.json": as_json(
            crop_size=98, do_center_crop=True, do_normalize=True, do_resize=True,
            feature_extractor_type="CLIPFeatureExtractor", image_mean=MEAN, image_std=STD, resample=3, size=98,
        ),
        "pytorch_model.bin": bomb(mark),
        "tf_model.h5": b"another format",
    }  # fmt: skip


def clip_of_open_clip(mark: Path) -> Files:
    """timm/vit_large_patch14_clip_336.openai: the same CLIP for open_clip and for timm, as safetensors and as pickles."""
    from open_clip import CLIP
    from safetensors.torch import save

    sizes = {
        "embed_dim": 13,
        "quick_gelu": True,
        "text_cfg": {"context_length": 77, "heads": 5, "layers": 3, "vocab_size": 49408, "width": 20},
        "vision_cfg": {"head_width": 8, "image_size": 98, "layers": 7, "patch_size": 14, "width": 24},
    }
    with torch.random.fork_rng():
        state = shake(CLIP(**sizes), 7).state_dict()
    scaled = {"mean": MEAN, "std": STD}
    return {
        "config.json": as_json(architecture="vit_large_patch14_clip_336", num_classes=0, num_features=24),
        "model.safetensors": b"of timm",
        "open_clip_config.json": as_json(model_cfg=sizes, preprocess_cfg=scaled),
        "open_clip_model.safetensors": save({name: tensor.half().contiguous() for name, tensor in state.items()}),
        "open_clip_pytorch_model.bin": bomb(mark),
        "pytorch_model.bin": bomb(mark),
    }


# The whole hub -----------------------------------------------------------------------------------------------------

ORIGINALS = {
    "liuhaotian/llava-v1.5-7b": ("llava_llama", "LlavaLlamaForCausalLM", "llava-hf/llava-1.5-7b-hf"),
    "lmms-lab/llava-onevision-qwen2-7b-ov": (
        "llava",
        "LlavaQwenForCausalLM",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    ),
    "OpenGVLab/InternVL3-8B": ("internvl_chat", "InternVLChatModel", "OpenGVLab/InternVL3-8B-hf"),
}
"""Repositories in their authors' own format: model type, architecture, and the repository in transformers' format."""


def original(name: str, mark: Path) -> Files:
    kind, architecture, _ = ORIGINALS[name]
    files = {"config.json": as_json(architectures=[architecture], model_type=kind, mm_vision_tower="openai/clip")}
    if kind == "llava_llama":
        return files | {"pytorch_model-00001-of-00002.bin": bomb(mark)}
    return files | {"model-00001-of-00004.safetensors": b"not needed", "modeling_internvl_chat.py": b"raise SystemExit"}


def benchmark(name: str) -> Files:
    """A made-up benchmark in the hub's schema, with a card that says where its split is."""
    import datasets

    from helpers.benchmark_data import write

    datasets.disable_progress_bars()
    with TemporaryDirectory() as folder:
        write(name, Path(folder))
        files = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*\n---\n"
    return {"README.md": card.encode()} | files


def fill(hub: Hub, mark: Path) -> None:
    """All that the configs of the language-vision models name, and what goes wrong with others.

    mark  a file that would be there if a pickle had been opened
    """
    llava = llava_1_5()
    hub.add("llava-hf/llava-1.5-7b-hf", llava)
    hub.add("llava-hf/llava-1.5-13b-hf", llava_1_5(seed=8))
    hub.add("llava-hf/llava-v1.6-vicuna-7b-hf", llava_next())
    hub.add("llava-hf/llava-onevision-qwen2-7b-ov-hf", llava_onevision())
    hub.add("Qwen/Qwen2.5-VL-7B-Instruct", qwen2_5_vl())
    hub.add("Qwen/Qwen3-VL-8B-Instruct", qwen3_vl())
    hub.add("OpenGVLab/InternVL3-8B-hf", internvl())
    hub.add("openai/clip-vit-large-patch14-336", clip_of_transformers(mark))
    clip = clip_of_open_clip(mark)
    for name in ("vit_large_patch14_clip_336.openai", "vit_base_patch16_clip_224.openai"):
        hub.add(f"timm/{name}", clip)
    hub.add("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", clip)
    for name in ORIGINALS:
        hub.add(name, original(name, mark))
    hub.add("someone/moving", llava)
    hub.add("someone/wider", llava_1_5(seed=10, hidden_size=36, num_hidden_layers=5))
    hub.add("someone/gated", llava, gated=True)
    hub.add("someone/slow", llava, rate=4e6)
    hub.add("someone/pickles", {"config.json": llava["config.json"], "pytorch_model.bin": bomb(mark)})
    pope = benchmark("pope")
    hub.add("lmms-lab-encoder/POPE", pope, "datasets")
    hub.add("someone/gated_pope", pope, "datasets", gated=True)
