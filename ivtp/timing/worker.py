"""A process that runs the cases of `suite=lead` on one checkout of ivtp: `ivtp.timing.lead` starts it as a script.

It reads one JSON object a line, first the sizes and then what to do, and answers in one. It uses only names that earlier
commits have too, so that the same code measures any of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch

from ivtp.api import prune
from ivtp.backbones import shape_of
from ivtp.evaluation.profiling import peak_bytes
from ivtp.pruners import load_pruner
from ivtp.timing.models import Size, build, prompts

TIMM = "vit_small_patch16_224"
MERGED = 40
"""Tokens that r = 13 leaves of 196 in twelve layers."""


class Cases:
    """The models of the suite, and a call for each case: (pruner, keep, batch); pruner None: the model's own forward."""

    def __init__(self, size: dict, text: int) -> None:
        self.size, self.text = Size(**size), text

    @cache  # noqa: B019 - the models live as long as the process
    def model(self, name: str) -> Any:
        """The LLaVA of these sizes, or a model of timm, with random weights."""
        if name == "llava":
            return build(self.size, "cpu", torch.float32)
        from timm import create_model

        torch.manual_seed(0)
        return create_model(name, pretrained=False).eval()

    def run(self, case: dict) -> tuple[Callable[[], object], Callable[[], AbstractContextManager]]:
        """The call of a case, and the context that it needs."""
        name, pruner, batch = case.get("model", "llava"), case["pruner"], case["batch"]
        model = self.model(name)
        settings: dict[str, Any] = {} if pruner in (None, "none") else {"keep": case["keep"]}
        if name == "llava":
            inputs, questions = prompts(model, batch, self.text)
            call = partial(model, **inputs, logits_to_keep=1, use_cache=True)
            more: dict[str, Any] = {"instruction": questions}
        else:
            image = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            call, more = partial(model, image), {}
            if pruner is not None:
                settings |= {"schedule": "constant"}
        if pruner is None:
            return call, nullcontext
        return call, partial(prune, model, load_pruner(pruner, shape_of(model), **settings), **more)

    @torch.inference_mode()
    def answer(self, case: dict, wanted: str) -> dict:
        """Seconds, or peak of the bytes, of one call of a case; an error where the method cannot do it."""
        try:
            call, inside = self.run(case)
        except ValueError as error:
            return {"error": str(error)}
        with inside():
            if wanted == "peak":
                call()  # what is allocated once is no part of it
                return {"peak": peak_bytes(call)}
            start = time.perf_counter()
            call()
            return {"seconds": time.perf_counter() - start}


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output
    cases = Cases(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(cases.answer(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
