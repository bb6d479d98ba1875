"""One forward call of a pruned model: its arguments, checked, its output, and text that follows a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.generic import ModelOutput

from ivtp.backbones.hooks.attention_interface import CACHE, cache_argument, refuse_layer_outputs
from ivtp.backbones.language.cache import (
    Origin,
    behind,
    check_continuation,
    check_positions,
    newly_hidden,
    next_position,
    pruned_layers,
)
from ivtp.backbones.language.llama import Llama
from ivtp.backbones.vlm.adapter import VLMAdapter
from ivtp.core.loop import traverse
from ivtp.core.tokens import Facts, Tokens
from ivtp.registry import UserError

SET_IN_CONFIG = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "mm_encoder_outputs",
    "vision_aspect_ratio",
)
"""Arguments of some families' own forward that a pruned forward reads from the config alone."""


@dataclass
class PrunedOutput(ModelOutput):
    """Fields that the LM heads of all families read; `cache`, `image_outputs` and `video_outputs` from transformers 5.24 on."""

    last_hidden_state: Tensor | None = None
    past_key_values: DynamicCache | None = None
    cache: DynamicCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    image_outputs: ModelOutput | None = None
    video_hidden_states: Tensor | None = None
    video_outputs: ModelOutput | None = None
    rope_deltas: Tensor | None = None  # of transformers before 5.23


@dataclass(frozen=True)
class Call:
    """Arguments of one forward call that can run pruned; `inputs` holds the images and what else a family reads."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: DynamicCache | None
    inputs: dict

    @classmethod
    def of(
        cls, core: Any, input_ids: Tensor | None, mask: Tensor | None, position_ids: Tensor | None, inputs: dict
    ) -> Call:
        """Check the arguments of a call of `core`, the model without its LM head, and make its cache if one is needed.

        Raises UserError for those that a pruned forward cannot serve.
        """
        refuse_layer_outputs(inputs, core.config)
        for name in SET_IN_CONFIG:
            if inputs.get(name) not in (None, getattr(core.config, name, None)):
                raise UserError(f"{name} is not read by a pruned forward; set it in the model's config or leave it out")
        if inputs.get("pixel_values_videos") is not None:
            raise UserError("videos cannot be pruned here; give their frames as images")
        if inputs.get("inputs_embeds") is not None or input_ids is None:
            raise UserError("under pruning, give input_ids: the image tokens cannot be found in inputs_embeds")
        cache, use_cache = inputs.get("cache"), inputs.get("use_cache")
        if cache is None:
            cache = inputs.get("past_key_values")
        decoder = core.language_model.config
        if cache is None and (decoder.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=decoder)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise UserError(
                f"{type(cache).__name__}: pruning leaves a different length in each layer, which only DynamicCache can "
                "hold; leave cache_implementation out, or use 'dynamic' or 'offloaded'"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UserError("under pruning, attention_mask must have one row per prompt and one column per token")
        return cls(input_ids, mask, position_ids, cache, inputs)


def decode(
    call: Call, cache: DynamicCache, core: Any, adapter: VLMAdapter, origin: Origin, renumber: bool
) -> PrunedOutput:
    """Run tokens behind a filled cache; the plan has no part in it, since only images are pruned.

    core    the model without its LM head
    origin  decoder and planner that must have filled the cache
    """
    if call.inputs.get("pixel_values") is not None:
        raise UserError(
            "pixel_values with a key-value cache: only a conversation's first call can bring images; leave "
            f"pixel_values out if the cache holds them, or give the whole conversation without {CACHE}"
        )
    ids, mask, position_ids = call.input_ids, call.attention_mask, call.position_ids
    check_continuation(cache, origin, ids, mask)
    layers, n = pruned_layers(cache), ids.shape[1]
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -n:].bool()
    hidden = None if mask is None else newly_hidden(cache, mask)
    following = next_position(cache)
    if hidden is not None and not (adapter.counts_padding and position_ids is None):
        following = following - hidden.sum(1, keepdim=True)
    if position_ids is not None:
        check_positions(position_ids, valid, following)
    elif adapter.counts_padding:
        position_ids = following + torch.arange(n, device=ids.device)
    else:
        position_ids = following + valid.cumsum(1) - 1
    rope = adapter.positions(ids, None, position_ids, {})
    if hidden is not None:
        for layer in layers:
            layer.hide(hidden)
    # The new tokens are inspected only where it matters, to avoid a GPU synchronisation.
    padded = mask is not None and (layers[0].keys_seen.padded or not bool(valid.all()))
    nothing = torch.zeros_like(valid)
    facts = Facts(0, padded, lone=False)
    tokens = Tokens.of(core.get_input_embeddings()(ids), nothing, nothing, valid=valid, facts=facts)
    decoder = core.language_model
    tokens, _ = traverse(Llama(decoder, cache, renumber=renumber, rope=lambda position: rope), tokens)
    layers[0].shift = torch.maximum(following, behind(rope)) - cache.get_seq_length()
    return PrunedOutput(last_hidden_state=decoder.norm(tokens.x), **cache_argument(cache))
