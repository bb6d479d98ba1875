"""Throughput of the prefill in batches: prompts of one length, and of several lengths, unsorted and sorted."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ivtp.backbones import shape_of
from ivtp.core.plan import Plan
from ivtp.pruners import load_pruner
from ivtp.timing.measure import Run, interleave
from ivtp.timing.models import PAD, QUESTION, prompts
from ivtp.timing.prefill import under

ORDERS = ("even", "as they come", "sorted")


def throughput(model: Any, keep: int, text: int, batches: Sequence[int], rounds: int, warmup: int) -> dict:
    """Images per second, median over the rounds, unpruned and under IVTP, for as many prompts as the largest batch has.

    even          prompts of `text` words, without padding
    as they come  prompts of a quarter of that to all of it, padded to the longest of a batch
    sorted        the same, the longest first (`trainer.sort`)
    """
    count = max(batches)
    plan, (inputs, _) = load_pruner("ivtp", shape_of(model), keep=keep), prompts(model, count, text)
    runs: dict[tuple[str, int, str], Run] = {}
    for size in batches:
        for order in ORDERS:
            batched = list(in_batches(inputs, text, size, order))
            runs["unpruned", size, order] = Run(prefills(model, batched, None))
            runs["ivtp", size, order] = Run(prefills(model, batched, plan))
    seconds = interleave(runs, rounds, model.device, warmup)
    rates: dict = {}
    for (name, size, order), values in seconds.items():
        rates.setdefault(name, {}).setdefault(str(size), {})[order] = count / median(values)
    return {"images": count, "text": text, "images_per_second": rates}


def prefills(model: Any, batches: list[tuple[dict[str, Tensor], list[str]]], plan: Plan | None) -> Callable[[], None]:
    """Function that runs the prefill of every batch."""

    def run() -> None:
        for inputs, questions in batches:
            with under(model, plan, questions):
                model(**inputs, logits_to_keep=1, use_cache=True)

    return run


def in_batches(inputs: dict[str, Tensor], text: int, size: int, order: str):
    """Batches of the same prompts of `text` words, padded on the left to the longest."""
    count, g = len(inputs["input_ids"]), torch.Generator().manual_seed(1)
    words = torch.randint(max(2, text // 4), text + 1, (count,), generator=g)
    if order == "even":
        words = torch.full_like(words, text)
    indices = words.argsort(descending=True, stable=True) if order == "sorted" else torch.arange(count)
    for chosen in indices.split(size):
        longest = int(words[chosen].max())
        rows, masks, questions = [], [], []
        for index in chosen.tolist():
            ids = inputs["input_ids"][index]
            tail = ids[ids.shape[0] - (int(words[index]) - 1) :]
            prompt = torch.cat([ids[: ids.shape[0] - (text - 1)], tail])
            blank = prompt.new_full((longest - int(words[index]),), PAD)
            rows.append(torch.cat([blank, prompt]))
            masks.append(torch.cat([torch.zeros_like(blank), torch.ones_like(prompt)]))
            questions.append(" ".join(map(str, tail[-QUESTION:].tolist())))
        more = {name: value[chosen.to(value.device)] for name, value in inputs.items() if name != "input_ids"}
        yield {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks), **more}, questions
