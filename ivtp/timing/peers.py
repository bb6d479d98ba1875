"""Peer methods on the same model and inputs.

Scores from the attention maps of an eager model, rollout as a product of whole maps, and kvpress, which shortens the
key-value cache after attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ivtp.backbones.hooks.attention_interface import CACHE
from ivtp.core.attention import Attention
from ivtp.core.plan import Stage
from ivtp.core.scores import Rollout
from ivtp.core.tokens import Tokens
from ivtp.evaluation.profiling import peak_bytes
from ivtp.timing.measure import Run, can_empty_heap, empty_heap, interleave, ratio, summary
from ivtp.timing.models import prompts
from ivtp.timing.prefill import Case, closed_cache_bytes, entered, kv_bytes


@contextmanager
def eager_maps(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Context with eager attention; yields the maps "b h n n" of every layer, as `output_attentions=True` does."""
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    stacks = {"vision": tower.encoder.layers, "language": model.model.language_model.layers}
    maps: dict[str, list[Tensor]] = {site: [] for site in stacks}
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, out, site=site: maps[site].append(out[1]))
        for site, layers in stacks.items()
        for layer in layers
    ]
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield maps
    finally:
        model.set_attn_implementation(kernel)
        for hook in hooks:
            hook.remove()


def dense_rollout(maps: list[Tensor]) -> Tensor:
    """Eq. 3 as written: the product "b n n" of the group's maps, all but the first plus the identity."""
    product = maps[0]
    for attention in maps[1:]:
        product = (attention + torch.eye(attention.shape[-1], device=attention.device)) @ product
    return product


def scores_from_maps(maps: list[Tensor], pruner: Stage | None, reference: int) -> list[Tensor]:
    """Row of the reference token at every cut of a schedule, from whole maps."""
    first, rows = 0, []
    for cut in pruner.schedule if pruner else ():
        group = [m.float().mean(1) for m in maps[first : cut.layer + 1]]
        rows.append(dense_rollout(group)[:, reference])
        first = cut.layer + 1
    return rows


def missing_kvpress() -> str | None:
    """Reason why kvpress cannot run; None if it can."""
    if find_spec("kvpress") is None:
        return "kvpress is not installed"
    if CACHE != "past_key_values":
        return "kvpress reads past_key_values, which transformers calls cache from 5.24 on"
    return None


def compare_peers(case: Case, rounds: int, warmup: int = 1) -> dict:
    """Time, peak memory and cache of the prefill: unpruned, with scores from eager maps, with kvpress at IVTP's cache size
    (where it can run), and under IVTP."""
    runs = case.runs()
    compared = {"sdpa": runs["unpruned"], "eager, scores from maps": scored_maps(case), "ivtp": runs["ivtp"]}
    if not missing_kvpress():
        compared["kvpress SnapKV"] = snapkv(case)
    seconds = interleave(compared, rounds, case.model.device, warmup)
    memory, cache = {}, {}
    for name, run in compared.items():
        with entered(run) as call:
            outputs: list = []
            memory[name] = peak_bytes(lambda call=call, outputs=outputs: outputs.append(call()), case.model.device)
            cache[name] = kv_bytes(outputs[0])
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "over_sdpa": {name: ratio(values, seconds["sdpa"]) for name, values in seconds.items()},
        "peak_bytes": memory,
        "cache_bytes": cache,
    }


def scored_maps(case: Case) -> Run:
    """Unpruned prefill in eager attention, with IVTP's rollouts as products of its maps."""
    prefill, plan = case.runs()["unpruned"].call, case.plans["ivtp"]
    current: list[dict[str, list[Tensor]]] = []

    @contextmanager
    def eager():
        with eager_maps(case.model) as maps:
            current[:] = [maps]
            yield
        current.clear()

    def scored():
        (maps,) = current
        for layers in maps.values():
            layers.clear()
        output = prefill()
        scores_from_maps(maps["vision"], plan.vision, 0)
        scores_from_maps(maps["language"], plan.language, -1)
        return output

    return Run(scored, eager)


def snapkv(case: Case) -> Run:
    """Prefill with SnapKV of kvpress at the size of IVTP's cache.

    The package requires transformers before 5.3, and runs before 5.24 (see experiments/speed) if it gets the positions that
    later versions no longer pass on.
    """
    inputs, _ = prompts(case.model, case.batch, case.text)
    pruned, whole = (closed_cache_bytes(case, name) for name in ("ivtp", "none"))
    length = inputs["input_ids"].shape[1]
    window = min(64, length // 2)  # its default, or less in a short prompt
    press = import_module("kvpress").SnapKVPress(compression_ratio=1 - pruned / whole, window_size=window)
    positions = torch.arange(length, device=case.model.device)
    return Run(
        lambda: case.model(**inputs, logits_to_keep=1, use_cache=True, cache_position=positions),
        lambda: press(case.model),
    )


def rollout_over_dense(
    device, dtype, rounds: int, n: int = 577, heads: int = 16, width: int = 64, layers: int = 3
) -> dict:
    """Ratio of time and memory of a group's rollout row: dense maps and their product over the score from q and k.

    products    the products q kᵀ alone, which every exact score needs: of all layers but the last, of which one row counts
    empty_heap  the same after free memory was returned to the system, as between a model's other layers; empty on a GPU and
                where the C library cannot return memory
    """
    g = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(1, n, heads, width, generator=g).to(device, dtype).transpose(1, 2)

    attentions = [Attention(random(), random(), random(), width**-0.5) for _ in range(layers)]
    index = torch.arange(n, device=device)[None]
    tokens = Tokens.of(torch.zeros(1, n, 1, device=device), index > 0, index == 0)
    score = Rollout(value_norm=False)

    def dense() -> Tensor:
        maps = [((a.q @ a.k.transpose(2, 3)) * a.scale).softmax(-1).float().mean(1) for a in attentions]
        row = dense_rollout(maps)[:, 0, 1:]
        return row / row.sum(1, keepdim=True)

    buffer = torch.empty(heads, n, n, device=device, dtype=dtype)

    def products() -> None:
        for a in attentions[:-1]:
            torch.bmm(a.q[0], a.k[0].transpose(1, 2), out=buffer)

    calls = {"dense": dense, "ivtp": lambda: score(attentions, tokens), "products": products}
    seconds = interleave({name: Run(call) for name, call in calls.items()}, max(rounds, 9), device, warmup=9)
    emptied = {}
    if torch.device(device).type == "cpu" and can_empty_heap():
        emptied = interleave({name: Run(call, empty_heap) for name, call in calls.items()}, max(rounds, 9), device)
    with torch.inference_mode():
        error = (score(attentions, tokens) - dense()).abs().max() / dense().max()
        memory = {name: peak_bytes(calls[name], device) for name in ("dense", "ivtp")}
    return {
        "n": n,
        "heads": heads,
        "layers": layers,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "time": ratio(seconds["dense"], seconds["ivtp"]),
        "time_of_products": ratio(seconds["dense"], seconds["products"]),
        "empty_heap": emptied
        and {
            "seconds": {name: summary(values) for name, values in emptied.items()},
            "time": ratio(emptied["dense"], emptied["ivtp"]),
        },
        "peak_bytes": memory,
        "memory": memory["dense"] / memory["ivtp"],
        "difference": float(error),
    }
