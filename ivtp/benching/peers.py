"""What others do, on the same model and inputs: scores out of attention maps that an eager model hands out, rollout as a
product of whole maps, and kvpress, which shortens the key-value cache behind the attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ivtp.backbones.transformers_attention import CACHE
from ivtp.benching.models import prompts
from ivtp.benching.prefill import Case, cache_bytes, entered, held
from ivtp.benching.timing import Run, can_empty_heap, empty_heap, interleave, ratio, summary
from ivtp.evaluation.speed import peak_bytes
from ivtp.pruning.attention import Attention
from ivtp.pruning.pruner import Pruner
from ivtp.pruning.scores import Rollout
from ivtp.pruning.tokens import Tokens


@contextmanager
def eager_maps(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The model with eager attention, whose maps "b h n n" of every layer are kept, as `output_attentions=True` does."""
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
    """Eq. 3 as it is written: the product of the group's maps, each with the identity, the first without; "b n n"."""
    product = maps[0]
    for attention in maps[1:]:
        product = (attention + torch.eye(attention.shape[-1], device=attention.device)) @ product
    return product


def scores_from_maps(maps: list[Tensor], pruner: Pruner, reference: int) -> list[Tensor]:
    """The reference's row at every cut of a schedule, from whole maps."""
    first, rows = 0, []
    for cut in pruner.schedule:
        group = [m.float().mean(1) for m in maps[first : cut.layer + 1]]
        rows.append(dense_rollout(group)[:, reference])
        first = cut.layer + 1
    return rows


def without_kvpress() -> str | None:
    """Why there is no row of kvpress; None: there is one."""
    if find_spec("kvpress") is None:
        return "kvpress is not installed"
    if CACHE != "past_key_values":
        return "kvpress reads past_key_values, which transformers calls cache from 5.24 on"
    return None


def beside(case: Case, rounds: int, warmup: int = 1) -> dict:
    """Time, peak memory and cache of the prefill: the model's own, with maps handed out and read, with kvpress down to
    IVTP's cache (where it can run), and under IVTP."""
    runs = case.runs()
    compared = {"sdpa": runs["unpruned"], "eager, scores from maps": maps_read(case), "ivtp": runs["ivtp"]}
    if not without_kvpress():
        compared["kvpress SnapKV"] = pressed(case)
    seconds = interleave(compared, rounds, case.model.device, warmup)
    memory, cache = {}, {}
    for name, run in compared.items():
        with entered(run) as call:
            made: list = []
            memory[name] = peak_bytes(lambda call=call, made=made: made.append(call()), case.model.device)
            cache[name] = held(made[0])
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "over_sdpa": {name: ratio(values, seconds["sdpa"]) for name, values in seconds.items()},
        "peak_bytes": memory,
        "cache_bytes": cache,
    }


def maps_read(case: Case) -> Run:
    """The unpruned prefill in eager attention, and IVTP's rollouts as products of its maps."""
    prefill, plan = case.runs()["unpruned"].call, case.plans["ivtp"]
    kept: list[dict[str, list[Tensor]]] = []

    @contextmanager
    def eager():
        with eager_maps(case.model) as maps:
            kept[:] = [maps]
            yield
        kept.clear()

    def scored():
        for found in kept[0].values():
            found.clear()
        output = prefill()
        scores_from_maps(kept[0]["vision"], plan.vision, 0)
        scores_from_maps(kept[0]["language"], plan.language, -1)
        return output

    return Run(scored, eager)


def pressed(case: Case) -> Run:
    """SnapKV by kvpress, leaving a cache as large as IVTP's. Its package asks for transformers before 5.3 and runs with
    those before 5.24 (see experiments/speed) if it is told the positions that those no longer hand on."""
    inputs, _ = prompts(case.model, case.batch, case.text)
    left = [cache_bytes(case, name)["closed"] for name in ("ivtp", "none")]
    length = inputs["input_ids"].shape[1]
    window = min(64, length // 2)  # its default, and what a short prompt has room for
    press = import_module("kvpress").SnapKVPress(compression_ratio=1 - left[0] / left[1], window_size=window)
    place = torch.arange(length, device=case.model.device)
    return Run(
        lambda: case.model(**inputs, logits_to_keep=1, use_cache=True, cache_position=place), lambda: press(case.model)
    )


def rollout_over_dense(
    device, dtype, rounds: int, n: int = 577, heads: int = 16, width: int = 64, layers: int = 3
) -> dict:
    """A group's rollout row from q and k, against dense maps and their product: how many times faster and smaller.

    products    the products q kᵀ alone that no exact score can do without: all but the last layer's, of which one row counts
    empty_heap  the same where all must ask the system for the memory they use, as between a model's other layers; empty on
                a GPU, and where the C library cannot be told to give memory back
    """
    g = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(1, n, heads, width, generator=g).to(device, dtype).transpose(1, 2)

    seen = [Attention(drawn(), drawn(), drawn(), width**-0.5) for _ in range(layers)]
    place = torch.arange(n, device=device)[None]
    tokens = Tokens.of(torch.zeros(1, n, 1, device=device), place > 0, place == 0)
    score = Rollout(value_norm=False)

    def dense() -> Tensor:
        maps = [((a.q @ a.k.transpose(2, 3)) * a.scale).softmax(-1).float().mean(1) for a in seen]
        row = dense_rollout(maps)[:, 0, 1:]
        return row / row.sum(1, keepdim=True)

    room = torch.empty(heads, n, n, device=device, dtype=dtype)

    def products() -> None:
        for a in seen[:-1]:
            torch.bmm(a.q[0], a.k[0].transpose(1, 2), out=room)

    calls = {"dense": dense, "ivtp": lambda: score(seen, tokens), "products": products}
    runs = {name: Run(call) for name, call in calls.items()}
    seconds = interleave(runs, max(rounds, 9), device, warmup=9)
    emptied = {}
    if torch.device(device).type == "cpu" and can_empty_heap():
        emptied = interleave({name: Run(call, empty_heap) for name, call in calls.items()}, max(rounds, 9), device)
    with torch.inference_mode():
        error = (runs["ivtp"].call() - dense()).abs().max() / dense().max()
        memory = {name: peak_bytes(runs[name].call, device) for name in ("dense", "ivtp")}
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
