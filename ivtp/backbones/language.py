"""The language model's part of a prefill. Its shapes are known beforehand and it asks the data nothing, so that it can be
compiled to one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ivtp.backbones.llama import Llama
from ivtp.backbones.pruned_cache import Keys, Memory
from ivtp.pruning.pruner import Plan, Pruner
from ivtp.pruning.tokens import Tokens
from ivtp.pruning.traverse import Kept, traverse
from ivtp.registry import UserError


@dataclass(frozen=True)
class Prefilled:
    """What went through the decoder.

    hidden  behind the last norm "b k d"
    keys    of every layer, which of the keys it saw are real; memory: these keys and their values
    cuts    places of the tokens that were left, as `Tokens.position` counts
    early   logits "b vocabulary" read out after part 1, or None
    """

    hidden: Tensor
    keys: list[Keys]
    memory: Memory
    cuts: list[Kept]
    early: Tensor | None


def prefill(
    decoder: nn.Module,
    head: nn.Module,
    plan: Plan,
    tokens: Tokens,
    places: Tensor,
    first: Tensor,
    appended: bool = False,
    read_at: int = 0,
    remembers: bool = True,
    part: Callable[[str], AbstractContextManager] = nullcontext,
) -> Prefilled:
    """Run a prompt through the decoder under the plan's language pruner.

    places     RoPE positions of the whole prompt and of one token more "b n+1", or "3 b n+1"
    first      where in the prompt the token stands whose `position` is 0 "b 1"
    appended   the last token is a reference, which goes after part 1
    read_at    layers after which the answer is read out; 0: never
    remembers  keys and values are asked for
    """

    def rope(position: Tensor) -> Tensor:
        return places.gather(-1, (position + first).expand(*places.shape[:-1], -1))

    def end_part1(tokens: Tokens) -> Tokens:
        if appended:
            tokens = tokens.without_last()
            stack.forget_last(stack.part1)
        if read_at:
            early.append(head(decoder.norm(tokens.x[:, -1])))
        return tokens

    early: list[Tensor] = []
    stack = Llama(decoder, renumber=plan.position_ids == "renumber", rope=rope, remembers=remembers)
    stack.part1 = plan.part1 if appended else read_at
    stack.on_part1 = end_part1 if stack.part1 else None
    tokens, cuts = traverse(stack, tokens, plan.language, part)
    return Prefilled(decoder.norm(tokens.x), stack.seen, stack.memory, cuts, early[0] if early else None)


LIMIT = 256
"""Graphs of one process: one for every plan, and for every batch size and length of prompt that is told apart."""


def compiled(how: str | Mapping) -> Callable[..., Prefilled]:
    """`prefill` as one graph of torch.compile; `how`: its mode, or its arguments by name.

    A method that looks at the data to know what to do next cannot be one graph; it says so, in a UserError.
    """
    graph = _graph(tuple(sorted({"mode": how}.items() if isinstance(how, str) else how.items())))

    def run(decoder, head, plan: Plan, *told) -> Prefilled:
        asks = asks_data(plan.language)
        if asks:
            raise UserError(f"compile={how}: this method cannot be one graph, since {asks}; run it without compile")
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=LIMIT):
            made = graph(decoder, head, plan, *told)
        # What a CUDA graph returns lies in its own memory, which the next run writes over. Keys and values are copied
        # into the cache anyway.
        cuts = [Kept(cut.layer, cut.after, cut.position.clone(), cut.valid.clone()) for cut in made.cuts]
        keys = [Keys(found.valid.clone(), found.padded) for found in made.keys]
        return Prefilled(
            made.hidden.clone(), keys, made.memory, cuts, None if made.early is None else made.early.clone()
        )

    return run


@cache
def _graph(settings: tuple[tuple[str, object], ...]) -> Callable[..., Prefilled]:
    return torch.compile(prefill, fullgraph=True, **dict(settings))


def asks_data(pruner: Pruner | None) -> str | None:
    """Why a pruner has to look at its data to know what to do next; None: it has not."""
    choices = (
        [] if pruner is None else [getattr(pruner, name, None) for name in ("score", "select", "reduce", "metric")]
    )
    return next((choice.asks_data for choice in choices if getattr(choice, "asks_data", None)), None)
