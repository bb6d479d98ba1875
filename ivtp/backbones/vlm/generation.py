"""Calls of a whole model around its pruned forward: the arguments of its LM head, and the loops of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor

from ivtp.backbones.hooks.attention_interface import CACHE
from ivtp.backbones.hooks.replacing import own, replaced
from ivtp.backbones.language.cache import (
    cached_mask,
    check_mask_rows,
    check_prompt_mask,
    is_pruned,
    next_position,
    other_rows,
)
from ivtp.core.plan import Plan
from ivtp.registry import UserError


@contextmanager
def generating(model: Any, plan: Plan) -> Iterator[None]:
    """Replace the methods of one model instance that would be wrong around a pruned forward; restored on exit."""
    methods = {
        "forward": checked_forward,
        "prepare_inputs_for_generation": checked_inputs,
        "_expand_inputs_for_generation": unexpanded_images,
        "_get_candidate_generator": late_candidates,
    }
    # transformers' continuous batching fills a paged cache and packs prompts of other lengths into one row.
    methods |= {name: refused for name in ("generate_batch", "init_continuous_batching") if hasattr(model, name)}
    if hasattr(model.model, "rope_deltas"):
        methods["_prepare_position_ids_for_generation"] = own_positions
    functions: dict[str, Callable] = {
        name: partial(around, model, plan, own(model, name)) for name, around in methods.items()
    }
    if hasattr(model, "_supports_mm_encoder_outputs"):
        # `generate` of newer transformers encodes images by itself before the prefill, unless the model cannot take that.
        functions["_supports_mm_encoder_outputs"] = lambda: False
    with replaced(model, **functions):
        yield


def checked_forward(model: Any, plan: Plan, forward: Callable, /, *args: Any, **kwargs: Any):
    """Refuse arguments that count the tokens of a prompt, of which fewer are left behind the language model."""
    arguments = dict(zip(signature(forward).parameters, args, strict=False)) | kwargs
    cache = arguments.get("cache", arguments.get("past_key_values"))
    if plan.prunes and (cache is None or cache.get_seq_length() == 0):
        if arguments.get("labels") is not None:
            raise UserError(
                "labels: pruning shortens the prompt, and the answer must not take part in it; prefill the prompt, "
                "then pass the answer as input_ids and labels together with the cache"
            )
        if isinstance(arguments.get("logits_to_keep"), Tensor):
            raise UserError(
                "logits_to_keep counts the tokens of the prompt, of which pruning leaves fewer; give a number, which "
                "counts from the end"
            )
    return forward(*args, **kwargs)


def checked_inputs(model: Any, plan: Plan, prepare: Callable, /, *args: Any, **kwargs: Any):
    """Refuse calls that would choose tokens anew at every step, by other reference tokens than the prompt's.

    A model that assists another gets the images, which transformers drops from its calls.
    """
    first, cache = kwargs.get("is_first_iteration", False), kwargs.get(CACHE)
    if cache is None and not first and (plan.language is not None or plan.needs_guide):
        raise UserError(
            "use_cache=False: this method would choose other tokens at every step, from the answer so far; leave "
            "use_cache out, or generate one token (max_new_tokens=1)"
        )
    if cache is not None and cache.get_seq_length() == 0:
        kwargs["is_first_iteration"] = True
    return prepare(*args, **kwargs)


IMAGES = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")
"""Inputs that count images, crops or patches, not prompts."""


def unexpanded_images(
    model: Any, plan: Plan, expand: Callable, /, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
):
    """Leave it to the pruned forward to repeat the images of a prompt for its beams.

    transformers would repeat every row of their pixels, which is a crop or a patch.
    """
    if expand_size == 1:
        return input_ids, model_kwargs
    images = {name: model_kwargs.pop(name) for name in IMAGES if name in model_kwargs}
    input_ids, model_kwargs = expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
    return input_ids, model_kwargs | (images | {"beams": expand_size} if images else {})


def late_candidates(model: Any, plan: Plan, generator_of: Callable, /, *args: Any, **kwargs: Any):
    """Delay the drafts of assisted generation to the second step: drafted tokens are no part of the prompt that is pruned."""
    cache = kwargs["model_kwargs"].get(CACHE)
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError(
            "assisted generation cannot go on from a filled cache under pruning; leave the assistant "
            f"(assistant_model, prompt_lookup_num_tokens) out, or give the whole conversation without {CACHE}"
        )
    generator = generator_of(*args, **kwargs)
    draft = generator.get_candidates

    def none_yet(input_ids: Tensor, **more: Any) -> tuple[Tensor, None]:
        draft(input_ids, **more)  # an assistant reads the prompt
        generator.get_candidates = draft
        return input_ids, None

    generator.get_candidates = none_yet
    return generator


def refused(model: Any, plan: Plan, function: Callable, /, *args: Any, **kwargs: Any):
    """Refuse continuous batching, whose paged cache holds the same tokens in every layer."""
    raise UserError(
        f"{function.__name__}: continuous batching keeps the same tokens in every layer, pruning does not; call generate "
        "on a padded batch"
    )


def own_positions(model: Any, plan: Plan, positions_of: Callable, /, inputs_tensor: Tensor, model_kwargs: dict):
    """Count M-RoPE positions on from the offset of the cache, and not of the last prompt of the model."""
    cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
    if cache is not None and is_pruned(cache):
        rows = len(inputs_tensor)
        check_mask_rows(rows, mask)
        real = cache.get_seq_length() if mask is None else cached_mask(cache).sum(1, keepdim=True)
        deltas = next_position(cache) - real
        if len(deltas) % rows:
            raise other_rows(cache, rows)
        # A cache comes repeated for its beams; `generate` repeats the positions afterwards.
        model.model.rope_deltas = deltas[:: len(deltas) // rows]
    elif cache is None or cache.get_seq_length() == 0:
        check_prompt_mask(inputs_tensor, mask)
    return positions_of(inputs_tensor, model_kwargs)
