"""Images per second of the prefill in batches: prompts of one length, and of several lengths, as they come and sorted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import median

import torch
from torch import Tensor, nn

from ivtp.benching.models import PAD, QUESTION, prompts
from ivtp.benching.timing import Run, interleave
from ivtp.models import prune, shape_of
from ivtp.pruners import load_pruner
from ivtp.pruning.pruner import Plan

ORDERS = ("even", "as they come", "sorted")


def throughput(model: nn.Module, keep: int, text: int, batches: Sequence[int], rounds: int, warmup: int) -> dict:
    """Images per second, median over the rounds, unpruned and under IVTP, of as many prompts as the largest batch holds.

    even  prompts of `text` words; nothing is padded. The others: of a quarter of that to all of it, padded to the longest
          of a batch, as they come or with the longest first (`trainer.sort`); a batch of one has no padding
    """
    count = max(batches)
    plan = load_pruner("ivtp", shape_of(model), keep=keep)
    runs: dict[tuple[str, int, str], Run] = {}
    for size in batches:
        for order in ORDERS:
            made = list(in_batches(model, count, text, size, order))
            runs["unpruned", size, order] = Run(every(model, made, None), torch.inference_mode)
            runs["ivtp", size, order] = Run(every(model, made, plan), torch.inference_mode)
    seconds = interleave(runs, rounds, model.device, warmup)
    found: dict = {}
    for (name, size, order), values in seconds.items():
        found.setdefault(name, {}).setdefault(str(size), {})[order] = count / median(values)
    return {"images": count, "text": text, "images_per_second": found}


def every(
    model: nn.Module, batches: list[tuple[dict[str, Tensor], list[str]]], plan: Plan | None
) -> Callable[[], None]:
    def under(asked: list[str]) -> AbstractContextManager:
        return torch.inference_mode() if plan is None else prune(model, plan, instruction=asked)

    def run() -> None:
        for inputs, asked in batches:
            with under(asked):
                model(**inputs, logits_to_keep=1, use_cache=True)

    return run


def in_batches(model: nn.Module, count: int, text: int, size: int, order: str):
    """The same `count` prompts in batches, padded on the left where they are not of one length."""
    inputs, _ = prompts(model, count, text)
    g = torch.Generator().manual_seed(1)
    words = torch.randint(max(2, text // 4), text + 1, (count,), generator=g)
    if order == "even":
        words = torch.full_like(words, text)
    places = words.argsort(descending=True, stable=True) if order == "sorted" else torch.arange(count)
    for some in places.split(size):
        longest = int(words[some].max())
        rows, masks, asked = [], [], []
        for place in some.tolist():
            own = inputs["input_ids"][place]
            spoken = own[own.shape[0] - (int(words[place]) - 1) :]
            kept = torch.cat([own[: own.shape[0] - (text - 1)], spoken])
            blank = kept.new_full((longest - int(words[place]),), PAD)
            rows.append(torch.cat([blank, kept]))
            masks.append(torch.cat([torch.zeros_like(blank), torch.ones_like(kept)]))
            asked.append(" ".join(map(str, spoken[-QUESTION:].tolist())))
        more = {name: value[some.to(value.device)] for name, value in inputs.items() if name != "input_ids"}
        yield {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks), **more}, asked
