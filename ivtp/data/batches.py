"""From samples to batches that a processor made, left-padded; a LightningDataModule for testing only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ivtp.data.questions import DataError


@dataclass
class Batch:
    """`inputs` for the model; `samples` as the data set gave them."""

    inputs: dict[str, Tensor]
    samples: list[dict]


class Collate:
    """Samples → Batch. `prompt` has a place for "{question}" and the image token, once."""

    def __init__(self, processor, prompt: str) -> None:
        image_token = processor.image_token
        if prompt.count("{question}") != 1 or prompt.count(image_token) != 1:
            raise DataError(f"prompt {prompt!r} must contain {{question}} once and {image_token} once")
        self.processor, self.prompt, self.image_token = processor, prompt, image_token
        self.processor.tokenizer.padding_side = "left"

    def __call__(self, samples: list[dict]) -> Batch:
        for sample in samples:
            if not sample["question"].strip():
                raise DataError(f"sample {sample['id']!r} has an empty question")
            if self.image_token in sample["question"]:
                raise DataError(f"sample {sample['id']!r}: its question contains the image token {self.image_token!r}")
        texts = [self.prompt.replace("{question}", sample["question"]) for sample in samples]
        images = [sample["image"] for sample in samples]
        inputs = self.processor(images=images, text=texts, return_tensors="pt", padding=True)
        return Batch(dict(inputs), samples)


@dataclass(frozen=True)
class Survey:
    """What a run has to know of all samples before the first; `hash` covers ids, texts, pixels and asked patches."""

    ids: list[str]
    questions: list[str]
    hash: str


class QuestionData(L.LightningDataModule):
    """A data set for testing; `done` holds ids that have their outcome already."""

    def __init__(self, data: Dataset, collate: Collate, batch_size: int, limit: int | None = None) -> None:
        super().__init__()
        if batch_size < 1:
            raise DataError(f"trainer.batch_size={batch_size} must be at least 1")
        if limit is not None and limit < 1:
            raise DataError(f"data.limit={limit} must be at least 1 question, or null for all")
        self.data = data if limit is None else Subset(data, range(min(limit, len(data))))
        self.collate, self.batch_size = collate, batch_size
        self.done: Collection[str] = ()

    @cached_property
    def survey(self) -> Survey:
        """Every sample looked at once: opening its image may be the dearest part of a start."""
        ids, questions, digest = [], [], hashlib.sha256()
        for sample in self.samples():
            ids.append(sample["id"])
            questions.append(sample["question"])
            digest.update(json.dumps([sample[name] for name in ("id", "question", "answer", "family")]).encode())
            digest.update(sample["image"].tobytes())
            digest.update(sample["patches"].numpy().tobytes())
        return Survey(ids, questions, digest.hexdigest()[:16])

    def samples(self) -> Iterator[dict]:
        """All samples, done or not."""
        return (self.data[i] for i in range(len(self.data)))

    def test_dataloader(self) -> DataLoader:
        data = self.data
        if self.done:
            data = Subset(data, [i for i, name in enumerate(self.survey.ids) if name not in self.done])
        return DataLoader(data, batch_size=self.batch_size, collate_fn=self.collate)

    def transfer_batch_to_device(self, batch: Batch, device, dataloader_idx: int) -> Batch:
        return Batch({name: value.to(device) for name, value in batch.inputs.items()}, batch.samples)
