"""The key-value cache of a pruned prefill: its layers differ in length, and report the length of the unpruned text.

`generate` slices prompts, positions and masks by that length; crops, beams and copies go through the layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ivtp.backbones.hooks.attention_interface import CACHE
from ivtp.backbones.vlm.trace import pad_left
from ivtp.registry import UserError

Memory = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, each "b h m e"."""


@dataclass(frozen=True)
class Keys:
    """Validity of the keys that a layer remembers "b m"; `padded`: False where all are valid."""

    valid: Tensor
    padded: bool


@dataclass(frozen=True)
class Origin:
    """The decoder and the planner that filled a cache; equal in every context that prunes the same model alike."""

    decoder: weakref.ref[nn.Module] | None
    planner: object

    def __deepcopy__(self, memo: dict) -> Origin:
        return self

    def __reduce__(self) -> tuple:
        """Reduce for pickle and `torch.save` to an unknown origin: a cache of another process fits no model of this one."""
        return Origin, (None, None)


class PrunedLayer(DynamicLayer):
    """One layer of a `DynamicCache` that holds fewer tokens than the text has.

    keys_seen  validity of `keys` and `values`
    removed    tokens of the text that are not in `keys`
    shift      position of the next token minus the length of the text "b 1": left padding, and M-RoPE's images
    prompt     tokens in `keys` after the prefill; the last `tail` of them (a tensor of one number) are text
    mask       attention mask of the prompt before pruning "b n"; that of later text is the end of `keys_seen`
    """

    def __init__(self, removed: int, prompt: Keys, shift: Tensor, tail: Tensor, mask: Tensor, origin: Origin) -> None:
        super().__init__()
        self.removed, self.shift, self.tail, self.mask, self.origin = removed, shift, tail, mask, origin
        self.keys_seen = Keys(prompt.valid[:, :0], False)
        self.prompt = prompt.valid.shape[1]
        self.expected: Keys | None = prompt

    def expect(self, new: Keys) -> Keys:
        """Announce the tokens of the next `update`; returns the validity of all keys after it."""
        before = self.keys_seen
        self.expected = Keys(torch.cat([before.valid, new.valid], 1), before.padded or new.padded)
        return self.expected

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.origin is not None:
            if self.expected is None:
                raise UserError(
                    "this key-value cache was filled under pruning, and its layers differ in length: continue it inside "
                    "ivtp.prune with the same settings, or start without a cache"
                )
            self.keys_seen, self.expected = self.expected, None
        if not self.is_initialized:
            # The base class would copy keys and values behind an empty tensor, and so hold them twice for a while.
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)

    def hide(self, hidden: Tensor) -> None:
        """Mask tokens behind the prompt that were visible so far: `hidden` "b m", one column per such token."""
        valid = self.keys_seen.valid
        later = valid[:, self.prompt :] & ~hidden
        self.keys_seen = Keys(torch.cat([valid[:, : self.prompt], later], 1), True)

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.removed if length else 0

    def crop(self, tokens_to_remove: int) -> None:
        keys, values, length = self.keys, self.values, super().get_seq_length()
        super().crop(tokens_to_remove)
        left = super().get_seq_length()
        if left < self.prompt and left < self.prompt - int(self.tail):
            self.keys, self.values = keys, values
            raise UserError(
                f"crop({tokens_to_remove}) would take image tokens out of a pruned cache; at most "
                f"{length - self.prompt + int(self.tail)} tokens, those behind the last image, can be removed"
            )
        self.keys_seen = Keys(self.keys_seen.valid[:, :left], self.keys_seen.padded)
        if left < self.prompt:
            self.tail, self.prompt = self.tail - (self.prompt - left), left
            self.mask = self.mask[:, : left + self.removed]

    def reset(self) -> None:
        self.keys = self.values = self.origin = self.expected = None
        self.is_initialized, self.removed = False, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda x: x[indices.to(x.device)])

    def _rows(self, select: Callable[[Tensor], Tensor]) -> None:
        self.keys_seen = Keys(select(self.keys_seen.valid), self.keys_seen.padded)
        self.shift, self.mask = select(self.shift), select(self.mask)


def pruned_layers(cache: object) -> list[PrunedLayer]:
    """Layers of a cache that a pruned prefill filled; empty for any other."""
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, PrunedLayer)]


def is_pruned(cache: object) -> bool:
    """Return whether a cache holds what a pruned prefill filled it with."""
    layers = pruned_layers(cache)
    return bool(layers) and layers[0].origin is not None


def fill(
    cache: DynamicCache,
    memory: Memory,
    keys: Sequence[Keys],
    positions: Tensor,
    image: Tensor,
    mask: Tensor,
    origin: Origin,
) -> None:
    """Fill an empty cache, in place, with the keys and values of a prefill, which are not copied.

    image  "b n" True: an image token of the prompt
    mask   "b n" False: padding
    """
    n = image.shape[1]
    # An image token at the end gives 0, a prompt without images its whole length.
    tail = image.flip(1).int().argmax(1).masked_fill(~image.any(1), n).min()
    shift = behind(positions) - n
    cache.layers[:] = [PrunedLayer(n - own.valid.shape[1], own, shift, tail, mask, origin) for own in keys]
    for number, keys_values in enumerate(memory):
        cache.update(*keys_values, number)


def next_position(cache: DynamicCache) -> Tensor:
    """Position of the token that follows "b 1"."""
    return cache.get_seq_length() + pruned_layers(cache)[0].shift


def cached_mask(cache: DynamicCache) -> Tensor:
    """Attention mask of the text that the cache holds, as of its last call "b length"."""
    layer = pruned_layers(cache)[0]
    return torch.cat([layer.mask, layer.keys_seen.valid[:, layer.prompt :]], 1)


def newly_hidden(cache: DynamicCache, attention_mask: Tensor) -> Tensor | None:
    """Tokens behind the prompt that the cache holds as visible and the mask now hides "b m"; None: the masks agree.

    `generate` pads a row that ends before the others; only the mask of a later call says so. Other differences raise
    UserError, since cached tokens have attended to the tokens in question.
    """
    before, after = cached_mask(cache), attention_mask[:, : cache.get_seq_length()].bool()
    changed = before != after
    if not bool(changed.any()):
        return None
    column = torch.arange(changed.shape[1], device=changed.device)
    start = pruned_layers(cache)[0].mask.shape[1]
    free = ((column + 1) * after).amax(1, keepdim=True).clamp_min(start)  # nothing visible follows from here on
    for does, wrong in (("shows", ~before & after), ("hides", before & ~after & (column < free))):
        if bool(wrong.any()):
            counts = wrong.sum(1)
            row = int((counts > 0).int().argmax())
            raise UserError(
                f"the attention_mask {does} {int(counts[row])} tokens of row {row} that the cache holds as "
                f"{'padding' if does == 'shows' else 'visible, and that later tokens or the pruning have read'}; pass the "
                f"mask that the cache was filled with (only the end of an answer can be hidden later), or start without "
                f"{CACHE}"
            )
    return changed[:, start:]


def behind(positions: Tensor) -> Tensor:
    """The position after the last of "b n" or, of M-RoPE, "3 b n": "b 1". Padding never has the largest."""
    return positions.reshape(-1, *positions.shape[-2:]).amax((0, 2))[:, None] + 1


WHOLE = "give generate the whole conversation, or its new tokens with the attention_mask of the whole"


def check_continuation(cache: DynamicCache, origin: Origin, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse tokens that cannot follow the text that the cache holds."""
    if not is_pruned(cache) or pruned_layers(cache)[0].origin != origin:
        raise UserError(
            f"this key-value cache was not filled under the pruning that is in force; start without {CACHE}"
        )
    (rows, n), length = input_ids.shape, cache.get_seq_length()
    if len(pruned_layers(cache)[0].shift) != rows:
        raise other_rows(cache, rows)
    if n == 0:
        raise UserError(f"no token follows the {length} that the cache holds; {WHOLE}")
    check_mask_rows(rows, attention_mask)
    if attention_mask is not None and attention_mask.shape[1] != length + n:
        raise UserError(
            f"attention_mask has {attention_mask.shape[1]} columns, but the cache holds {length} tokens and {n} follow; "
            f"{WHOLE}"
        )


def other_rows(cache: DynamicCache, rows: int) -> UserError:
    """Error for a cache that does not hold one prompt for each of `rows`."""
    prompts = len(pruned_layers(cache)[0].shift)
    fits = prompts < rows and rows % prompts == 0
    method = "batch_repeat_interleave" if fits else "batch_select_indices"
    return UserError(
        f"the cache holds {prompts} prompts, but input_ids has {rows} rows; {'repeat' if fits else 'select'} those of the "
        f"cache with cache.{method}"
    )


def check_prompt_mask(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse a mask of a prefill that is not one of its tokens."""
    shape = input_ids.shape[:2]
    if attention_mask is not None and attention_mask.shape != shape:
        raise UserError(
            f"attention_mask is {tuple(attention_mask.shape)}, but input_ids is {tuple(shape)}; give the mask one row per "
            "prompt and one column per token"
        )


def check_mask_rows(rows: int, attention_mask: Tensor | None) -> None:
    """Refuse a mask of other prompts than those of a conversation that goes on."""
    if attention_mask is not None and len(attention_mask) != rows:
        raise UserError(f"attention_mask has {len(attention_mask)} rows, but input_ids has {rows}; give one per prompt")


def check_positions(position_ids: Tensor, valid: Tensor, following: Tensor) -> None:
    """Refuse positions of several tokens that do not go on where the cache ends; of one, `generate` counts right."""
    if valid.shape[1] == 1:
        return
    positions = position_ids.reshape(-1, *position_ids.shape[-2:])[-1].expand_as(valid)
    start = positions.gather(1, valid.int().argmax(1, keepdim=True))
    wrong = (start != following) & valid.any(1, keepdim=True)
    if bool(wrong.any()):
        row = int(wrong[:, 0].int().argmax())
        raise UserError(
            f"position_ids of the new tokens start at {int(start[row])}, but the cache goes on at {int(following[row])}; "
            f"{WHOLE}, and prefill padded prompts by generate (a forward without position_ids counts padding)"
        )


def join(memories: Sequence[Memory], keys: Sequence[Sequence[Keys]], order: Tensor) -> tuple[Memory, list[Keys]]:
    """Join keys and values of several groups of prompts to one batch, padded on the left, its rows in `order`.

    The groups' lists are emptied on the way, so that no layer is held twice.
    """
    memory = []
    while memories[0]:
        layer = [own.pop(0) for own in memories]
        memory.append(tuple(pad_left(list(states), 2)[order] for states in zip(*layer, strict=True)))
    layers = []
    for layer in zip(*keys, strict=True):
        ragged = len({own.valid.shape[1] for own in layer}) > 1
        padded = ragged or any(own.padded for own in layer)
        layers.append(Keys(pad_left([own.valid for own in layer], 1)[order], padded))
    return memory, layers
