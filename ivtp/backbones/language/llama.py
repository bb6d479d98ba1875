"""transformers' Llama-like decoders, and their part of a prefill. Its shapes are known beforehand and depend on no data, so that
it can be compiled to one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ivtp.backbones.family import ModelError, layers_of
from ivtp.backbones.hooks.attention_interface import attend, cache_argument, key_mask, peek
from ivtp.backbones.hooks.padding import log_size, score_bias
from ivtp.backbones.language.cache import Keys, Memory, pruned_layers
from ivtp.core.attention import Attention
from ivtp.core.flops import Layers
from ivtp.core.loop import Kept, traverse
from ivtp.core.plan import Plan
from ivtp.core.tokens import Tokens
from ivtp.registry import UserError

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text")


def decoder_layers(config: Any) -> Layers:
    """Sizes of the decoder of a vision-language model's config; ModelError for one that is opened in another way."""
    text = config.text_config
    if text.model_type not in DECODERS:
        raise ModelError(
            f"a {config.model_type} with text_config of type {text.model_type!r} cannot be pruned; supported: "
            f"{', '.join(DECODERS)}"
        )
    slides = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if slides or (text.model_type == "mistral" and text.sliding_window is not None):
        raise ModelError("a decoder with sliding-window attention cannot be pruned; supported: full attention")
    return layers_of(text, gated=True)


class Llama:
    """A `LlamaModel` as a stack.

    cache     the cache of a pruned prefill, which the tokens continue; None: they are a prompt
    keys      validity of the keys of every layer that has run
    memory    keys and values of every layer that has run; kept where `remembers`, for a cache that is filled later
    part1     after this many leading layers `on_part1` is called; it may remove the appended reference token
    renumber  positions close up over pruned tokens instead of staying what they were
    rope      maps tokens' positions "b n" to the input of the rotary embedding: "b n", or "3 b n" for M-RoPE
    """

    def __init__(
        self,
        decoder: Any,
        cache: DynamicCache | None = None,
        renumber: bool = False,
        rope: Callable[[Tensor], Tensor] = lambda position: position,
        remembers: bool = False,
    ) -> None:
        self.decoder, self.layers = decoder, decoder.layers[: decoder.config.num_hidden_layers]
        self.depth = self.read = len(self.layers)
        self.cache, self.renumber, self.rope, self.remembers = cache, renumber, rope, remembers
        self.cached = pruned_layers(cache)
        self.keys: list[Keys] = []
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.part1 = 0
        self.on_part1: Callable[[Tokens], Tokens] | None = None
        self._rotary: tuple[Tensor, Any] | None = None
        self._masked: tuple[Tensor, Tensor | None] | None = None

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block = self.layers[layer]
        keys, bias = Keys(tokens.valid, tokens.facts.padded), None
        if self.cache is None:
            bias = log_size(tokens, layer, proportional)
        else:
            keys = self.cached[layer].expect(keys)
        self.keys.append(keys)
        output, (q, k, v) = attend(
            block.self_attn,
            block.input_layernorm(tokens.x),
            attention_mask=self._mask(tokens, keys, bias),
            position_embeddings=self._position_embeddings(tokens, keys.valid),
            **cache_argument(self.cache),
        )
        if self.remembers:
            self.memory.append((k, v))
        # Text behind a cache is not pruned: its attention, whose bias would have to cover all keys, is never read.
        bias = None if self.cache is not None else score_bias(tokens, bias)
        return tokens.x + output, Attention(q, k, v, block.self_attn.scaling, bias, causal=True)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block = self.layers[layer]
        rotary = self._position_embeddings(tokens, tokens.valid)
        x = block.input_layernorm(tokens.x)
        q, k, v = peek(block.self_attn, x, attention_mask=None, position_embeddings=rotary)
        return Attention(q, k, v, block.self_attn.scaling, score_bias(tokens, None), causal=True)

    def norm(self, x: Tensor) -> Tensor:
        return self.decoder.norm(x)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.layers[layer]
        return x + block.mlp(block.post_attention_layernorm(x))

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        width = tokens.x.shape[2]
        if tokens.feature is not None and layer * width < tokens.feature.shape[2]:
            # DeepStack: a tower layer's features of the tokens that are left are added behind each of the first layers.
            tokens = tokens.with_x(tokens.x + tokens.feature[:, :, layer * width : (layer + 1) * width])
        if self.on_part1 is not None and layer == self.part1 - 1:
            tokens = self.on_part1(tokens)
        return tokens

    def forget_last(self, layers: int) -> None:
        """Remove the last token from keys and memory of the first `layers` layers."""
        for layer in range(layers):
            self.keys[layer] = Keys(self.keys[layer].valid[:, :-1], self.keys[layer].padded)
            if self.remembers:
                keys, values = self.memory[layer]
                self.memory[layer] = keys[:, :, :-1], values[:, :, :-1]

    def _mask(self, tokens: Tokens, keys: Keys, bias: Tensor | None) -> Tensor | None:
        """Mask of the kernel, without a bias computed once between two cuts."""

        def mask() -> Tensor | None:
            kernel, n = self.decoder.config._attn_implementation, tokens.x.shape[1]
            return key_mask(kernel, keys.valid, n, True, bias, tokens.x.dtype, keys.padded)

        if bias is not None:
            return mask()
        if self._masked is None or self._masked[0] is not keys.valid:
            self._masked = keys.valid, mask()
        return self._masked[1]

    def _position_embeddings(self, tokens: Tokens, valid: Tensor) -> Any:
        position = tokens.position
        if self.renumber:
            closed = (valid.long().cumsum(1) - 1).clamp_min(0)
            return self.decoder.rotary_emb(tokens.x, closed[:, -tokens.x.shape[1] :])
        if self._rotary is None or self._rotary[0] is not position:
            self._rotary = position, self.decoder.rotary_emb(tokens.x, self.rope(position))
        return self._rotary[1]


@dataclass(frozen=True)
class PromptTokens:
    """Prompts as the decoder gets them.

    positions  RoPE positions of the whole prompt and of one token more "b n+1", or "3 b n+1"
    first      place in the prompt of the token whose `position` is 0 "b 1"
    appended   the last token is a reference token, which is removed after part 1
    """

    tokens: Tokens
    positions: Tensor
    first: Tensor
    appended: bool = False

    def rope(self, position: Tensor) -> Tensor:
        """RoPE positions of tokens at `position` "b k"."""
        return self.positions.gather(-1, (position + self.first).expand(*self.positions.shape[:-1], -1))


@dataclass(frozen=True)
class Prefilled:
    """Output of the decoder.

    hidden  behind the last norm "b k d"
    keys    validity of each layer's keys; memory: these keys and their values
    cuts    places of the tokens that are left, as `Tokens.position` counts
    early   logits "b vocabulary" read out after part 1, or None
    """

    hidden: Tensor
    keys: list[Keys]
    memory: Memory
    cuts: list[Kept]
    early: Tensor | None


def prefill(
    decoder: Any,
    head: Any,
    plan: Plan,
    prompt: PromptTokens,
    read_at: int = 0,
    remembers: bool = True,
    part: Callable[[str], AbstractContextManager] = nullcontext,
) -> Prefilled:
    """Run a prompt through the decoder under the plan's language stage.

    read_at    layers after which the answer is read out; 0: never
    remembers  keys and values are kept for a cache
    """

    def end_part1(tokens: Tokens) -> Tokens:
        nonlocal early
        if prompt.appended:
            tokens = tokens.without_last()
            stack.forget_last(stack.part1)
        if read_at:
            early = head(decoder.norm(tokens.x[:, -1]))
        return tokens

    early: Tensor | None = None
    stack = Llama(decoder, renumber=plan.position_ids == "renumber", rope=prompt.rope, remembers=remembers)
    stack.part1 = plan.part1 if prompt.appended else read_at
    stack.on_part1 = end_part1 if stack.part1 else None
    tokens, cuts = traverse(stack, prompt.tokens, plan.language, part)
    return Prefilled(decoder.norm(tokens.x), stack.keys, stack.memory, cuts, early)


LIMIT = 256
"""Graphs of one process: one for every plan, batch size and length of prompt that is told apart."""


def compiled(how: str | Mapping) -> Callable[..., Prefilled]:
    """`prefill` as one graph of torch.compile; `how`: its mode, or its arguments by name.

    Running it raises UserError for a method whose next step depends on data: it cannot be one graph.
    """
    graph = _graph(tuple(sorted({"mode": how}.items() if isinstance(how, str) else how.items())))

    def run(decoder: Any, head: Any, plan: Plan, *arguments: Any) -> Prefilled:
        reason = None if plan.language is None else plan.language.asks_data
        if reason:
            raise UserError(f"compile={how}: this method cannot be one graph, since {reason}; run it without compile")
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=LIMIT):
            output = graph(decoder, head, plan, *arguments)
        # The outputs of a CUDA graph lie in its own memory, which its next run overwrites.
        return replace(
            output,
            hidden=output.hidden.clone(),
            keys=[Keys(keys.valid.clone(), keys.padded) for keys in output.keys],
            memory=[(keys.clone(), values.clone()) for keys, values in output.memory],
            cuts=[replace(cut, position=cut.position.clone(), valid=cut.valid.clone()) for cut in output.cuts],
            early=None if output.early is None else output.early.clone(),
        )

    return run


@cache
def _graph(settings: tuple[tuple[str, Any], ...]) -> Callable[..., Prefilled]:
    return torch.compile(prefill, fullgraph=True, **dict(settings))
