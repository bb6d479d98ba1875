"""Run as a script, `compiled.py METHOD:BACKEND …`: prefills compiled to one graph, beside those that are not."""

from __future__ import annotations

import sys

import torch
from conftest import TEXTS, close, inputs, llava, plan_of

import ivtp


def answered(model, plan, batch, prepare=lambda run: None, steps: int = 3, **more):
    """Logits of every generated token "b t vocabulary", and the trace."""
    with torch.inference_mode(), ivtp.prune(model, plan, instruction=list(TEXTS), read_early=True, **more) as run:
        prepare(run)
        found = model.generate(
            **batch, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(found.logits, 1), run.trace


def compare(name: str, backend: str) -> None:
    """Padding, decoding from the cache and the answer read out after part 1 included."""
    model, batch = llava(), inputs()
    plan = plan_of(name, model)
    logits, trace = answered(model, plan, batch)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for _ in range(2):  # the second context finds the graph that the first one made
        found, seen = answered(model, plan, batch, lambda run: run.compile({"backend": backend}))
        close(found, logits)
        close(seen.early, trace.early)
        for cut, expected in zip(seen.vision + seen.language, trace.vision + trace.language, strict=True):
            assert torch.equal(cut.position, expected.position)
        assert graphs["unique_graphs"] == before + 1
    other = {key: value.flip(0) for key, value in batch.items()}
    with torch.inference_mode(), ivtp.prune(model, plan) as run:
        expected = model(**other).logits
        run.compile({"backend": backend})
        close(model(**other).logits, expected)


if __name__ == "__main__":
    for method in sys.argv[1:]:
        compare(*method.split(":"))
        print(method)
