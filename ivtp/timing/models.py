"""Models of real sizes with random weights, and prompts for them; nothing is downloaded."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ivtp.experiment.config import load_config
from ivtp.registry import UserError

BOS, EOS, PAD, UNK, IMAGE = range(5)
QUESTION = 20
"""Words of the question at the end of every prompt."""

CLIP_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class Size:
    """Sizes of a vision-language model; `crops`: LLaVA-NeXT, whose image of 672 × 672 is the whole and four crops."""

    name: str
    vision: dict = field(hash=False)
    text: dict = field(hash=False)
    clip: dict = field(hash=False, default_factory=lambda: CLIP_TEXT)
    crops: bool = False

    def config(self):
        """Config of transformers with these sizes."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

        kind: Any = LlavaNextConfig if self.crops else LlavaConfig
        side = self.vision["image_size"]
        more = {"image_seq_length": (side // self.vision["patch_size"]) ** 2}
        if self.crops:
            more = {"image_grid_pinpoints": [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]}
        marks: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        return kind(
            vision_config=CLIPVisionConfig(**self.vision),
            text_config=LlamaConfig(**self.text, **marks),
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            **more,
        )


def of_model(name: str) -> Size:
    """Sizes of `configs/model/NAME.yaml`. Raises UserError for a family other than LLaVA and LLaVA-NeXT."""
    model: Any = OmegaConf.to_container(load_config([f"model={name}"]).model)
    sizes = model.get("config") or {}
    kind = sizes.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise UserError(
            f"model={name}: ivtp.bench makes prompts for LLaVA and LLaVA-NeXT by their config's sizes; choose one"
        )
    vision, text = (
        {key: value for key, value in sizes[part].items() if key != "model_type"}
        for part in ("vision_config", "text_config")
    )
    return Size(name, vision, text, crops=kind == "llava_next")


LLAVA_7B = of_model("llava_1_5_7b")
LLAVA_NEXT_7B = of_model("llava_next_7b")
VIT_L = LLAVA_7B.vision
SMALL = Size(
    "tiny",
    {**VIT_L, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 4, "num_attention_heads": 3}
    | {"image_size": 35, "patch_size": 7, "projection_dim": 13},
    {**LLAMA_1B, "hidden_size": 42, "intermediate_size": 53, "num_hidden_layers": 8, "num_attention_heads": 6}
    | {"num_key_value_heads": 2, "head_dim": 10, "vocab_size": 101},
    {**CLIP_TEXT, "hidden_size": 20, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 5}
    | {"projection_dim": 13},
)
SMALL_CROPS = Size("tiny, crops", SMALL.vision, SMALL.text, SMALL.clip, crops=True)
BASE = Size(
    "ViT-S/16-224 + 25M decoder",
    {**VIT_L, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    | {"image_size": 224, "patch_size": 16, "projection_dim": 128},
    {**LLAMA_1B, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"num_key_value_heads": 8, "vocab_size": 8000},
    {**CLIP_TEXT, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"projection_dim": 128},
)
CPU = Size("ViT-L/14-336 + 1B decoder", VIT_L, LLAMA_1B)


def build(size: Size, device: torch.device | str, dtype: torch.dtype, kernel: str = "sdpa", pack: bool = False):
    """Build a model with random weights, a tokenizer of whole words and a CLIP text encoder.

    pack  pack the weights of model and text encoder
    """
    from transformers import AutoModelForImageTextToText, CLIPTextConfig, CLIPTextModelWithProjection

    from ivtp.api import load_model
    from ivtp.backbones.hooks import packed_linear as packed
    from ivtp.backbones.text.encoders import TransformersText

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(size.config(), dtype=dtype, attn_implementation=kernel)
        clip = CLIPTextConfig(vocab_size=size.text["vocab_size"], bos_token_id=BOS, eos_token_id=EOS, **size.clip)
        text = CLIPTextModelWithProjection._from_config(clip, dtype=dtype).eval()
        projection = torch.randn(size.clip["projection_dim"], size.vision["hidden_size"], dtype=dtype)
    model.generation_config.eos_token_id = None  # nothing ends early
    model.generation_config.pad_token_id = PAD
    words = tokenizer(size.text["vocab_size"])
    encoder: Any = TransformersText(packed.pack(text) if pack else text, words, projection)
    return load_model(model, SimpleNamespace(tokenizer=words), encoder, device=str(device), pack=pack)[0]


def tokenizer(vocabulary: int):
    """Tokenizer with one token per word; words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<unk>", "<image>"]
    known = {word: i for i, word in enumerate([*special, *map(str, range(len(special), vocabulary))])}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, **dict(zip(names, special, strict=False)), additional_special_tokens=special[4:]
    )


def prompts(model: Any, batch: int, text: int, seed: int = 0) -> tuple[dict[str, Tensor], list[str]]:
    """Prompts of different images, each with `text` words around it and no padding, and the question at each one's end."""
    from ivtp.backbones import shape_of

    g = torch.Generator().manual_seed(seed)
    shape, config = shape_of(model), model.config
    side = config.vision_config.image_size
    words = torch.randint(IMAGE + 1, config.text_config.vocab_size, (batch, text), generator=g)
    words[:, 0] = BOS
    image = torch.full((batch, shape.tokens + shape.separators), IMAGE)
    size = (batch, shape.crops, 3, side, side) if shape.crops > 1 else (batch, 3, side, side)
    inputs = {
        "input_ids": torch.cat([words[:, :1], image, words[:, 1:]], 1),
        "pixel_values": torch.randn(size, generator=g).to(model.dtype),
    }
    if shape.crops > 1:
        inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * batch)
    questions = [" ".join(map(str, row[-min(QUESTION, text - 1) :].tolist())) for row in words]
    return {name: value.to(model.device) for name, value in inputs.items()}, questions
