"""Which of transformers' decoders are Llama-like, and their sizes."""

from __future__ import annotations

from ivtp.backbones import ModelError
from ivtp.pruning.cost import Layers

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text")


def decoder_layers(config) -> Layers:
    """Sizes of the decoder of a vision-language model's config; ModelError for one that is opened in another way."""
    text = config.text_config
    if text.model_type not in DECODERS:
        raise ModelError(
            f"a {config.model_type} with text_config of type {text.model_type!r} cannot be pruned; supported: "
            f"{', '.join(DECODERS)}"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()) or (
        text.model_type == "mistral" and text.sliding_window is not None
    ):
        raise ModelError("a decoder with sliding-window attention cannot be pruned; supported: full attention")
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Layers(text.num_hidden_layers, text.hidden_size, text.intermediate_size, heads, kv_heads, head_width, 3)
