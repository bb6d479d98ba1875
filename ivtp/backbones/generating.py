"""Calls of a whole model around its pruned forward: the arguments of its LM head, and the loops of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature

from torch import Tensor, nn

from ivtp.backbones.pruned_cache import (
    cached_mask,
    check_mask_rows,
    check_prompt_mask,
    is_pruned,
    next_position,
    other_rows,
)
from ivtp.backbones.replacing import own, replaced
from ivtp.backbones.transformers_attention import CACHE
from ivtp.pruning.pruner import Plan
from ivtp.registry import UserError


@contextmanager
def generating(model: nn.Module, plan: Plan) -> Iterator[None]:
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
    functions = {name: around(model, plan, own(model, name)) for name, around in methods.items()}
    if hasattr(model, "_supports_mm_encoder_outputs"):
        # `generate` of newer transformers encodes images by itself before the prefill, unless the model cannot take that.
        functions["_supports_mm_encoder_outputs"] = lambda: False
    with replaced(model, **functions):
        yield


def checked_forward(model: nn.Module, plan: Plan, forward: Callable) -> Callable:
    """Refuse arguments that count the tokens of a prompt of which fewer are left behind the language model."""
    names = list(signature(forward).parameters)

    @wraps(forward)
    def call(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        cache = given.get("cache", given.get("past_key_values"))
        if plan.prunes and (cache is None or cache.get_seq_length() == 0):
            if given.get("labels") is not None:
                raise UserError(
                    "labels: pruning shortens the prompt, and the answer must not take part in it; prefill the prompt, "
                    "then pass the answer as input_ids and labels together with the cache"
                )
            if isinstance(given.get("logits_to_keep"), Tensor):
                raise UserError(
                    "logits_to_keep counts the tokens of the prompt, of which pruning leaves fewer; give a number, which "
                    "counts from the end"
                )
        return forward(*args, **kwargs)

    return call


def checked_inputs(model: nn.Module, plan: Plan, prepare: Callable) -> Callable:
    """Refuse to choose the tokens anew at every step, by other references than the prompt's; and let a model that
    assists another see the images, which transformers drops from its calls."""

    @wraps(prepare)
    def call(*args, **kwargs):
        first, cache = kwargs.get("is_first_iteration", False), kwargs.get(CACHE)
        if cache is None and not first and (plan.language is not None or plan.needs_guide):
            raise UserError(
                "use_cache=False: this method would choose other tokens at every step, from the answer so far; leave "
                "use_cache out, or generate one token (max_new_tokens=1)"
            )
        if cache is not None and cache.get_seq_length() == 0:
            kwargs["is_first_iteration"] = True
        return prepare(*args, **kwargs)

    return call


IMAGES = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")
"""Inputs that count images, crops or patches, not prompts."""


def unexpanded_images(model: nn.Module, plan: Plan, expand: Callable) -> Callable:
    """Leave it to the pruned forward to repeat the images of a prompt for its beams: transformers would repeat every
    row of their pixels, which is a crop or a patch."""

    @wraps(expand)
    def call(expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        if expand_size == 1:
            return input_ids, model_kwargs
        images = {name: model_kwargs.pop(name) for name in IMAGES if name in model_kwargs}
        input_ids, model_kwargs = expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if images:
            model_kwargs |= images | {"beams": expand_size}
        return input_ids, model_kwargs

    return call


def late_candidates(model: nn.Module, plan: Plan, generator_of: Callable) -> Callable:
    """Assisted generation drafts from the second step on: drafted tokens are no part of the prompt that is pruned."""

    @wraps(generator_of)
    def call(*args, **kwargs):
        cache = kwargs["model_kwargs"].get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            raise UserError(
                "assisted generation cannot go on from a filled cache under pruning; leave the assistant "
                f"(assistant_model, prompt_lookup_num_tokens) out, or give the whole conversation without {CACHE}"
            )
        generator = generator_of(*args, **kwargs)
        draft = generator.get_candidates

        def none_yet(input_ids: Tensor, **more) -> tuple[Tensor, None]:
            draft(input_ids, **more)  # an assistant reads the prompt
            generator.get_candidates = draft
            return input_ids, None

        generator.get_candidates = none_yet
        return generator

    return call


def refused(model: nn.Module, plan: Plan, function: Callable) -> Callable:
    """Refuse continuous batching, whose paged cache holds the same tokens in every layer."""

    @wraps(function)
    def call(*args, **kwargs):
        raise UserError(
            f"{function.__name__}: continuous batching keeps the same tokens in every layer, pruning does not; call generate "
            "on a padded batch"
        )

    return call


def own_positions(model: nn.Module, plan: Plan, positions_of: Callable) -> Callable:
    """M-RoPE counts on from the offset of the last prompt that the model saw; a cache brings that of its own."""

    @wraps(positions_of)
    def call(inputs_tensor, model_kwargs):
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        if is_pruned(cache):
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

    return call
