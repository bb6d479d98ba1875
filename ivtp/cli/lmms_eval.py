"""Pruned models as a model of lmms-eval, through its entry point group `lmms_eval.models`.

    lmms-eval --model ivtp --model_args pretrained=tiny,pruner=ivtp,keep=16 --tasks pope --batch_size 8

Answers come from the same code as in `python -m ivtp.run data=lmms data.task=pope`, so the metrics are the same.
"""

import os
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ivtp.api import load_model
from ivtp.backbones import shape_of
from ivtp.backbones.family import family_of
from ivtp.backbones.text.memory import TextMemory
from ivtp.backbones.text.pairing import guide_for
from ivtp.data.batches import Batch, Prepare
from ivtp.data.datamodule import CHAT, Collate
from ivtp.data.loader import Loader, default_workers
from ivtp.evaluation.answering import respond
from ivtp.experiment.planning import LOADING, quiet_libraries
from ivtp.lmms.dataset import request_fields
from ivtp.lmms.generation import generation_settings, stop_texts, truncate
from ivtp.pruners.budget import share
from ivtp.pruners.planner import Planner
from ivtp.registry import UserError


def manifest():
    """Name and class path of the model for lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="ivtp", simple_class_path="ivtp.cli.lmms_eval.Ivtp")


class Requests:
    """Requests of lmms-eval as a data set of samples."""

    def __init__(self, requests: list, task_dict: dict, chat: bool) -> None:
        self.requests, self.task_dict, self.chat = requests, task_dict, chat

    def texts(self, index: int) -> dict:
        """Fields of a sample without its images."""
        *_, number, task, _ = self.requests[index].args
        text = self.requests[index].args[0]
        return {"id": f"{task}-{number:06d}", "question": text, "answer": "", "family": "all"}

    def __getitem__(self, index: int) -> dict:
        *_, number, task, split = self.requests[index].args
        text, show = self.requests[index].args[0], self.requests[index].args[1 if self.chat else 2]
        fields = request_fields(show(self.task_dict[task][split][number]), text, self.chat)
        return self.texts(index) | fields


class Ivtp(lmms):
    """Model of lmms-eval that answers requests under a pruner; in several processes (accelerate launch, torchrun) each
    answers its share.

    pretrained  as of `ivtp.load_model`: "tiny", a folder, a hub id
    pruner      a name from `ivtp.list_pruners()`, with its settings beside it (keep=64, tau=0.2, …)
    ratio       in place of keep: the share of the visual tokens that stays, as in ratio=1/9
    prompt      as `model.prompt` of the configs: a template, or "chat"; default: the processor's chat template
    device      default: the GPU of this process, else the CPU
    settings    of `ivtp.load_model`: dtype, revision, device_map, load_in_4bit, text_encoder, image_padding, max_crops,
                max_pixels, …; the published numbers of LLaVA-1.5 need image_padding=pad
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        pruner: str = "ivtp",
        prompt: str = CHAT,
        batch_size: int | str = 1,
        ratio: float | str | None = None,
        device: str | None = None,
        **settings,
    ) -> None:
        super().__init__()
        quiet_libraries()
        if not str(batch_size).isdigit() or int(batch_size) < 1 or settings.pop("max_batch_size", None):
            raise UserError(f"batch_size={batch_size} must be a whole number of at least 1, without max_batch_size")
        if ratio is not None and "keep" in settings:
            raise UserError(f"keep={settings['keep']} and ratio={ratio} are both given; choose one")
        part = None if ratio is None else share(ratio, "ratio")
        loading = {name: settings.pop(name) for name in LOADING if name in settings}
        self.device = device_of_rank(device)
        self.model, self.processor = load_model(pretrained, device=str(self.device), **loading)
        self.pruner = Planner(pruner, shape_of(self.model), settings, part)
        self.reads_text = self.pruner.outline.reads_text
        self.adapter = family_of(self.model).adapter(self.model)
        self.collate, self.batch_size = Collate(self.processor, prompt), int(batch_size)
        self.is_simple = prompt != CHAT  # the kind of request that lmms-eval makes

    def generate_until(self, requests: list) -> list[str]:
        """Answer requests; a batch has requests of one task with the same settings."""
        answers: dict[int, str] = {}
        position = 1 if self.is_simple else 2
        kinds = [(request.args[-2], str(sorted(request.args[position].items()))) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: kinds[i])
        groups = [list(same) for _, same in groupby(order, key=lambda i: kinds[i])]
        batches = [same[i : i + self.batch_size] for same in groups for i in range(0, len(same), self.batch_size)]
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
        workers, pin = default_workers(self.device, processes), self.device.type == "cuda"
        loader = Loader(
            batches, Prepare(Requests(requests, self.task_dict, not self.is_simple), self.collate), workers, pin
        )
        options: dict[str, Any] = {"adapter": self.adapter}
        if self.reads_text:
            texts = [requests[i].args[0] for i in order]
            options["text_encoder"] = TextMemory(guide_for(self.model).encoder, texts)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model responding") as progress:
            for chosen, batch in zip(batches, loader, strict=True):
                for failed in batch.failed:
                    raise UserError(f"sample {failed.sample['id']!r} {failed.cause}: {failed.reason}")
                settings = requests[chosen[0]].args[position]
                texts = self._answer(batch, generation_settings(settings), options)
                answers |= {i: truncate(text, stop_texts(settings)) for i, text in zip(chosen, texts, strict=True)}
                progress.update(len(chosen))
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _answer(self, batch: Batch, generation: dict, options: dict) -> list[str]:
        batch = batch.to(self.model.device)
        return respond(self.model, self.processor, self.pruner, batch, generation, **options)[0]

    def loglikelihood(self, requests):
        """Refuse tasks of log-likelihoods."""
        raise UserError("tasks of log-likelihoods cannot be run: a pruned model answers prompts (generate_until)")

    def generate_until_multi_round(self, requests):
        """Refuse tasks of several rounds."""
        raise UserError("tasks of several rounds cannot be run: a pruned model answers one prompt (generate_until)")


def device_of_rank(device: str | None) -> torch.device:
    """The device of this process among those that accelerate or torchrun started; raises UserError for one that all share."""
    ranks, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cpu":
        return found
    if found.index is not None and ranks > 1:
        raise UserError(
            f"device={device} would hold all {ranks} processes; leave it out, and each takes a GPU of its own"
        )
    return found if found.index is not None else torch.device(found.type, local)
