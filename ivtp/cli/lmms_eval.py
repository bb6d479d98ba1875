"""Pruned models as a model of lmms-eval, through its entry point group `lmms_eval.models`.

    lmms-eval --model ivtp --model_args pretrained=tiny,pruner=ivtp,keep=16 --tasks pope --batch_size 8

Answers come from the same code as in `python -m ivtp.run data=lmms data.task=pope`, so the metrics are the same.
"""

import os
from itertools import groupby

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ivtp.api import load_model
from ivtp.backbones import shape_of
from ivtp.data.datamodule import CHAT, Batch, Collate
from ivtp.evaluation.answering import respond
from ivtp.experiment.planning import quiet_libraries
from ivtp.lmms.dataset import request_fields
from ivtp.lmms.generation import generation_settings, stop_texts, truncate
from ivtp.pruners.planner import Planner
from ivtp.registry import UserError


def manifest():
    """Name and class path of the model for lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="ivtp", simple_class_path="ivtp.cli.lmms_eval.Ivtp")


class Ivtp(lmms):
    """Model of lmms-eval that answers requests under a pruner.

    pretrained  as of `ivtp.load_model`: "tiny", a folder, a hub id
    pruner      a name from `ivtp.list_pruners()`, with its settings beside it (keep=64, tau=0.2, …)
    prompt      as `model.prompt` of the configs: a template, or "chat"; default: the processor's chat template
    image_padding, max_crops  as of `ivtp.load_model`: the published numbers of LLaVA-1.5 need image_padding=pad
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        pruner: str = "ivtp",
        prompt: str = CHAT,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        text_encoder: str | None = None,
        image_padding: str | None = None,
        max_crops: int | None = None,
        **more,
    ) -> None:
        super().__init__()
        quiet_libraries()
        if not str(batch_size).isdigit() or int(batch_size) < 1 or more.pop("max_batch_size", None):
            raise UserError(f"batch_size={batch_size} must be a whole number of at least 1, without max_batch_size")
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        self.model, self.processor = load_model(
            pretrained,
            text_encoder=text_encoder,
            dtype=dtype,
            device=str(self.device),
            revision=revision,
            attn_implementation=attn_implementation,
            image_padding=image_padding,
            max_crops=max_crops,
        )
        self.pruner = Planner(pruner, shape_of(self.model), more)
        _ = self.pruner.outline  # wrong settings raise before the first request
        self.collate, self.batch_size = Collate(self.processor, prompt), int(batch_size)
        self.is_simple = prompt != CHAT  # the kind of request that lmms-eval makes

    def generate_until(self, requests: list) -> list[str]:
        """Answer requests; a batch has requests of one task with the same settings."""
        answers: dict[int, str] = {}
        position = 1 if self.is_simple else 2
        kinds = [(request.args[-2], str(sorted(request.args[position].items()))) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: kinds[i])
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model responding") as progress:
            for _, same in groupby(order, key=lambda i: kinds[i]):
                same = list(same)
                settings = requests[same[0]].args[position]
                for start in range(0, len(same), self.batch_size):
                    chosen = same[start : start + self.batch_size]
                    texts = self._answer([self._sample(requests[i]) for i in chosen], generation_settings(settings))
                    answers |= {i: truncate(text, stop_texts(settings)) for i, text in zip(chosen, texts, strict=True)}
                    progress.update(len(chosen))
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _answer(self, samples: list[dict], generation: dict) -> list[str]:
        batch = self.collate(samples)
        batch = Batch({name: value.to(self.device) for name, value in batch.inputs.items()}, samples)
        return respond(self.model, self.processor, self.pruner, batch, generation)[0]

    def _sample(self, request) -> dict:
        *_, number, task, split = request.args
        doc = self.task_dict[task][split][number]
        text, show = request.args[0], request.args[2 if self.is_simple else 1]
        return {"id": f"{task}-{number:06d}", "question": text, **request_fields(show(doc), text, not self.is_simple)}

    def loglikelihood(self, requests):
        """Refuse tasks of log-likelihoods."""
        raise UserError("tasks of log-likelihoods cannot be run: a pruned model answers prompts (generate_until)")

    def generate_until_multi_round(self, requests):
        """Refuse tasks of several rounds."""
        raise UserError("tasks of several rounds cannot be run: a pruned model answers one prompt (generate_until)")
