"""transformers' Llama-like decoders."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import DynamicCache

from ivtp.backbones.clip_vit import score_bias
from ivtp.backbones.pruned_cache import Keys
from ivtp.backbones.transformers_attention import CACHE, attend, key_mask, peek
from ivtp.pruning.attention import Attention
from ivtp.pruning.tokens import Tokens


class Llama:
    """A `LlamaModel` as a stack.

    cache     the cache of a pruned prefill, which the tokens continue; None: they are a prompt
    seen      of every layer that has run which of its keys are real
    memory    of every layer that has run its keys and values; kept where `remembers`, for a cache that is filled later
    part1     after this many leading layers `on_part1` is called; it may take the appended reference token away
    renumber  positions close up over pruned tokens instead of staying what they were
    rope      from tokens' positions "b n" to what the rotary embedding takes: "b n", or "3 b n" for M-RoPE
    """

    def __init__(
        self,
        decoder: nn.Module,
        cache: DynamicCache | None = None,
        renumber: bool = False,
        rope: Callable[[Tensor], Tensor] = lambda position: position,
        remembers: bool = False,
    ) -> None:
        self.decoder = decoder
        self.layers = decoder.layers[: decoder.config.num_hidden_layers]
        self.depth = len(self.layers)
        self.cache = cache
        self.seen: list[Keys] = []
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.renumber, self.rope, self.remembers = renumber, rope, remembers
        self.part1, self.on_part1 = 0, None
        self._rotary: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def attend(self, layer: int, tokens: Tokens, proportional: bool) -> tuple[Tensor, Attention]:
        block = self.layers[layer]
        n = tokens.x.shape[1]
        valid, padded = tokens.valid, tokens.facts.padded
        if self.cache is not None:
            keys = self.cache.layers[layer].expect(valid, padded)
            valid, padded = keys.valid, keys.padded
        self.seen.append(Keys(valid, padded))
        bias = None
        if proportional and layer > 0 and self.cache is None:
            bias = tokens.size.log()
        kernel = block.self_attn.config._attn_implementation
        output, (q, k, v) = attend(
            block.self_attn,
            block.input_layernorm(tokens.x),
            attention_mask=key_mask(kernel, valid, n, True, bias, tokens.x.dtype, padded),
            position_embeddings=self._position_embeddings(tokens, valid),
            **{CACHE: self.cache},
        )
        if self.remembers:
            self.memory.append((k, v))
        # Text that follows a cache is not pruned: nothing reads its attention, whose bias would have to cover all keys.
        bias = None if self.cache is not None else score_bias(tokens, bias)
        return tokens.x + output, Attention(q, k, v, block.self_attn.scaling, bias, causal=True)

    def peek(self, layer: int, tokens: Tokens) -> Attention:
        block = self.layers[layer]
        q, k, v = peek(
            block.self_attn,
            block.input_layernorm(tokens.x),
            attention_mask=None,
            position_embeddings=self._position_embeddings(tokens, tokens.valid),
        )
        return Attention(q, k, v, block.self_attn.scaling, score_bias(tokens, None), causal=True)

    def norm(self, x: Tensor) -> Tensor:
        return self.decoder.norm(x)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.layers[layer]
        return x + block.mlp(block.post_attention_layernorm(x))

    def leave(self, layer: int, tokens: Tokens) -> Tokens:
        width = tokens.x.shape[2]
        if tokens.feature is not None and layer * width < tokens.feature.shape[2]:
            # DeepStack: each of the first layers is followed by a tower layer's view of the visual tokens that are left.
            tokens = tokens.with_x(tokens.x + tokens.feature[:, :, layer * width : (layer + 1) * width])
        if self.on_part1 is not None and layer == self.part1 - 1:
            tokens = self.on_part1(tokens)
        return tokens

    def forget_last(self, layers: int) -> None:
        """Remove the last token from what the first `layers` layers remember."""
        for layer in range(layers):
            self.seen[layer] = Keys(self.seen[layer].valid[:, :-1], self.seen[layer].padded)
            if self.remembers:
                keys, values = self.memory[layer]
                self.memory[layer] = keys[:, :, :-1], values[:, :, :-1]

    def _position_embeddings(self, tokens: Tokens, valid: Tensor) -> tuple[Tensor, Tensor]:
        position = tokens.position
        if self.renumber:
            position = (valid.long().cumsum(1) - 1).clamp_min(0)[:, -tokens.x.shape[1] :]
        elif self._rotary is not None and self._rotary[0] is position:
            return self._rotary[1]
        rotary = self.decoder.rotary_emb(tokens.x, position if self.renumber else self.rope(position))
        self._rotary = (position, rotary)
        return rotary
