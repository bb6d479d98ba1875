"""Tiny random models of every vision-language family, with the real config classes and the real processors."""

from __future__ import annotations

from functools import cache

import torch
from conftest import byte_tokenizer, make_text_encoder, shake
from PIL import Image

from helpers.place import placed

TEXTS = ("what color is the round thing ?", "how many cube are there left of it ?", "is the thing small ?")
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 53,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 7,
    "num_attention_heads": 3,
    "num_channels": 3,
}


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise in blocks of a few pixels, so that patches differ after any resizing."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (1, 3, -(-height // 5), -(-width // 5)), generator=generator).float()
    large = torch.nn.functional.interpolate(small, (height, width))[0].byte()
    return Image.fromarray(large.permute(1, 2, 0).numpy())


def tokenizer(*special: str, **named: str):
    """Byte pairs with the special tokens of a family; named ones become the tokenizer's attributes."""
    more = {"extra_special_tokens": named} if named else {}
    made = byte_tokenizer(padding_side="left", pad_token="<end>", **more)
    made.add_special_tokens({"additional_special_tokens": [*special, *named.values()]})
    return made


def build(model_class, config, seed: int = 5):
    model = shake(model_class._from_config(config, attn_implementation="sdpa"), seed)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # nothing ends early
    return model


def llava_1_5(width: int | None = None):
    """`width`: of all layers, for kernels that ask for round numbers."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer("<image>")
    round_numbers = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4} if width else {}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER | round_numbers, image_size=35, patch_size=7),
        text_config=LlamaConfig(**TEXT | round_numbers, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=25,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35})
    processor = LlavaProcessor(
        images, words, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return build(LlavaForConditionalGeneration, config), processor, "<image>"


PINPOINTS = [[35, 70], [70, 35], [70, 70], [35, 105], [105, 35]]


def llava_next():
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
    )

    words = tokenizer("<image>")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=35, patch_size=7),
        text_config=MistralConfig(**TEXT, vocab_size=len(words), sliding_window=None),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        images, words, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return build(LlavaNextForConditionalGeneration, config), processor, "<image>"


def llava_onevision(limit: int = 9):
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    words = tokenizer("<image>", "<video>")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, image_size=35, patch_size=7, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{limit}",
    )
    images = LlavaOnevisionImageProcessor(size={"height": 35, "width": 35}, image_grid_pinpoints=PINPOINTS)
    processor = LlavaOnevisionProcessor(
        images,
        words,
        LlavaOnevisionVideoProcessor(size={"height": 35, "width": 35}),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{limit}",
    )
    return build(LlavaOnevisionForConditionalGeneration, config), processor, "<image>"


QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")


def qwen_ids(words) -> dict[str, int]:
    start, image, end, video = words.convert_tokens_to_ids(list(QWEN))
    return {
        "vision_start_token_id": start,
        "image_token_id": image,
        "vision_end_token_id": end,
        "video_token_id": video,
    }


def qwen2_5_vl():
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )

    classes = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    return qwen(*classes, {"window_size": 28, "fullatt_block_indexes": [2, 5]})


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

    classes = Qwen3VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor
    return qwen(*classes, {"num_position_embeddings": 49, "deepstack_visual_indexes": [1, 3]}, head_dim=12)


def qwen(model_class, config_class, processor_class, video_class, vision: dict, **text):
    """A Qwen-VL, its processor and what stands for an image; `vision` and `text` are what its generation adds."""
    from transformers import Qwen2VLImageProcessor

    words = tokenizer(*QWEN)
    size = {"patch_size": 7, "merge_size": 2, "temporal_patch_size": 2}
    config = config_class(
        vision_config={
            "depth": 7,
            "hidden_size": 24,
            "intermediate_size": 37,
            "num_heads": 3,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 48,
            **vision,
        },
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
            **text,
        },
        **qwen_ids(words),
    )
    images = Qwen2VLImageProcessor(size={"shortest_edge": 14 * 14 * 4, "longest_edge": 14 * 14 * 40}, **size)
    processor = processor_class(images, words, video_class(**size))
    return build(model_class, config), processor, "<|vision_start|><|image_pad|><|vision_end|>"


def internvl():
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(**names)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **TOWER,
            image_size=[42, 42],
            patch_size=[7, 7],
            use_qk_norm=True,
            norm_type="rms_norm",
            use_mean_pooling=False,
        ),
        text_config=Qwen2Config(**TEXT, vocab_size=len(words)),
        image_token_id=words.context_image_token_id,
        image_seq_length=9,
    )
    images = GotOcr2ImageProcessor(size={"height": 42, "width": 42}, crop_to_patches=True, min_patches=1, max_patches=6)
    processor = InternVLProcessor(
        images, words, InternVLVideoProcessor(size={"height": 42, "width": 42}), image_seq_length=9
    )
    return build(InternVLForConditionalGeneration, config), processor, "<IMG_CONTEXT>"


FAMILIES = {
    "llava": llava_1_5,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
}
SIZES = {"llava": (35, 35), "qwen2_5_vl": (84, 70), "qwen3_vl": (84, 70), "internvl": (84, 42)}
"""Height and width of the pictures in the tests: several crops, some padding, windows that are not full."""


GUIDED = ("llava", "llava_next")
"""Families with a CLIP tower: the others have no text encoder that reads the instruction for the image."""


@cache
def family(name: str):
    """Model, processor and image token of a family, made once."""
    from ivtp import load_model

    model, processor, image = FAMILIES[name]()
    load_model(model, processor, make_text_encoder() if name in GUIDED else None)
    return model, processor, image


def encode(name: str, texts, images) -> dict:
    """Prompts with their images (a list for each, maybe none) as the family's processor makes them."""
    _, processor, image = family(name)
    prompts = [image * len(own) + text for text, own in zip(texts, images, strict=True)]
    flat = [picture for own in images for picture in own]
    return placed(dict(processor(images=flat or None, text=prompts, return_tensors="pt", padding=True)))


def batch(name: str, texts=TEXTS, size: tuple[int, int] | None = None) -> dict:
    """One picture of its own for each prompt, all of one size."""
    height, width = size or SIZES.get(name, (70, 56))
    return encode(name, texts, [[photo(height, width, TEXTS.index(text))] for text in texts])
