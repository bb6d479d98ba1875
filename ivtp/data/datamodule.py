"""Collate samples into left-padded batches; a LightningDataModule for testing only."""

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch.utils.data import Dataset, Subset

from ivtp.data.answers import exact
from ivtp.data.batches import Batch, Prepare, SafeCollate, images_of
from ivtp.data.failures import PREPARING, READING, DataError, Failed, failure, out_of_memory, read, texts
from ivtp.data.loader import Loader

CHAT = "chat"
"""Value of `prompt` for the processor's own chat template."""


class Collate:
    """Collate samples into a batch; sets the processor's tokenizer to pad on the left.

    prompt   a template with "{question}" and the image token, each once (the token stands for all images of a sample); or
             "chat": the processor's chat template, on the sample's `messages`, else on one user message with the images
             and the question
    context  the context length of the model in tokens, image tokens included; None: no limit

    Raises DataError, naming the sample, for one without a usable prompt.
    """

    def __init__(self, processor, prompt: str, context: int | None = None) -> None:
        self.processor, self.prompt, self.image_token = processor, prompt, processor.image_token
        self.context = context
        if prompt == CHAT:
            if not getattr(processor, "chat_template", None):
                raise DataError(
                    "model.prompt=chat, but this processor has no chat template; give a prompt with {question}"
                )
        elif prompt.count("{question}") != 1 or prompt.count(self.image_token) != 1:
            raise DataError(
                f"prompt {prompt!r} must contain {{question}} once and {self.image_token} once, or be 'chat'"
            )
        processor.tokenizer.padding_side = "left"

    def __call__(self, samples: list[dict]) -> Batch:
        """Collate samples."""
        texts = [self.render(sample) for sample in samples]
        visuals = [images for images in map(images_of, samples) if images]
        if all(len(images) == 1 for images in visuals):
            visuals = [image for (image,) in visuals]
        # A template that writes the begin mark itself must not get a second one from the tokenizer.
        mark = self.processor.tokenizer.bos_token
        more = {"add_special_tokens": False} if self.prompt == CHAT and mark and texts[0].startswith(mark) else {}
        inputs = self.processor(images=visuals or None, text=texts, return_tensors="pt", padding=True, **more)
        for sample, length in zip(samples, inputs["attention_mask"].sum(1).tolist(), strict=True):
            self._check_length(sample, length, "images included")
        return Batch(dict(inputs), samples)

    def _check_length(self, sample: dict, length: int, counted: str) -> None:
        if self.context and length > self.context:
            raise DataError(
                f"sample {sample['id']!r}: its prompt has {length} tokens, {counted}, but the model's context is "
                f"{self.context} (max_position_embeddings); shorten the question, or show fewer or smaller images"
            )

    def render(self, sample: dict) -> str:
        """Prompt of a sample as text, one image token for each of its images."""
        text = self._filled(sample)
        if self.context and len(text) > self.context:  # only then, since it takes time
            self._check_length(sample, len(self.processor.tokenizer(text)["input_ids"]), "before its images")
        return text

    def _filled(self, sample: dict) -> str:
        question, images = sample["question"], len(images_of(sample))
        if not question.strip():
            raise DataError(f"sample {sample['id']!r} has an empty question")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise DataError(f"sample {sample['id']!r}: its question holds half of a surrogate pair, which is no text")
        marked = question.count(self.image_token)
        if marked and ("images" not in sample or marked != images):
            raise DataError(
                f"sample {sample['id']!r}: its question contains the image token {self.image_token!r}"
                + (f" {marked} times, but it has {images} images" if "images" in sample else "")
            )
        if self.prompt == CHAT:
            content = [*[{"type": "image"}] * (images - marked), {"type": "text", "text": question}]
            messages = sample.get("messages") or [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens, template = " ".join([self.image_token] * (images - marked)), self.prompt
        if not tokens:  # remove the space behind the image token too
            template = re.sub(re.escape(self.image_token) + r"\s*", "", template)
        return template.replace(self.image_token, tokens).replace("{question}", question)


@dataclass(frozen=True)
class Survey:
    """Facts about all samples that a run needs before the first; `hash` covers ids, texts, images and target patches.

    prompts  texts for the model, with one image token per image
    sizes    of the images of each sample; None: not opened
    failed   index → failure of a sample that is known to be unusable; its prompt is empty
    """

    ids: list[str]
    questions: list[str]
    prompts: list[str]
    hash: str
    sizes: list[list[tuple[int, int]] | None]
    failed: dict[int, Failed] = field(default_factory=dict)


@dataclass(eq=False)
class WithoutImages(Dataset):
    """Samples of a data set without their images and image tokens, for blind accuracy."""

    data: Any
    image_token: str

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        sample = {name: value for name, value in self.data[index].items() if name != "image"}
        if "messages" in sample:
            sample["messages"] = [
                {**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in sample["messages"]
            ]
        question = sample["question"].replace(self.image_token, "").strip()
        return sample | {"images": [], "question": question, "patches": torch.zeros_like(sample["patches"])}


class QuestionData(L.LightningDataModule):
    """Data module for testing; a batch is the unit of work.

    left     batches of indices that are to be evaluated; None: all of `batches`
    workers  processes that prepare batches ahead of the model; 0: the main process prepares each when it is due
    pin      hand batches on in pinned memory
    cache    a `BatchCache`, or None
    sort     longest prompts first, so that little is padded
    by_size  samples whose images have equal sizes side by side, for models that read images of several sizes

    A data set may have more than items: `scorer(sample, text)` → fields of an outcome (see `exact`); `generation`, settings
    of `generate`; `scores(outcomes, folder)`, metrics of its own; `about`, facts that its results depend on;
    `sketch(index)` → a sample without its images, and bytes for their content, where that is cheaper than opening them.
    """

    def __init__(
        self,
        data: Any,
        collate: Any,
        batch_size: int,
        limit: int | None = None,
        sort: bool = False,
        by_size: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise DataError(f"trainer.batch_size={batch_size} must be at least 1")
        if limit is not None and limit < 1:
            raise DataError(f"data.limit={limit} must be at least 1 question, or null for all")
        self.source = data
        self.data: Any = data if limit is None else Subset(data, range(min(limit, len(data))))
        self.collate, self.batch_size, self.sort, self.by_size = collate, batch_size, sort, by_size
        self.scorer = getattr(data, "scorer", exact)
        self.generation, self.about = dict(getattr(data, "generation", {})), dict(getattr(data, "about", {}))
        self.left: list[list[int]] | None = None
        self.workers, self.pin, self.cache = 0, False, None

    @cached_property
    def survey(self) -> Survey:
        """Survey of all samples. Opening images can dominate start-up time; see `sketch`."""
        ids, questions, prompts, sizes, digest, failed = [], [], [], [], hashlib.sha256(), {}
        for index in range(len(self.data)):
            sample, content = self._sketch(index)
            if isinstance(sample, Failed):
                failed[index], sample = sample, sample.sample
                sizes.append(None)
            else:
                sizes.append(self._known_sizes(sample))
                try:
                    prompts.append(self.collate.render(sample))
                except Exception as error:
                    failed[index] = failure(sample, error, PREPARING)
            if index in failed:
                prompts.append("")
            ids.append(sample["id"])
            questions.append(sample["question"])
            digest.update(json.dumps([sample[name] for name in ("id", "question", "answer", "family")]).encode())
            if "answers" in sample:
                digest.update(json.dumps(sample["answers"]).encode())
            digest.update(content)
        if failed and len(failed) == len(ids):
            first = failed[0]
            raise DataError(f"none of the {len(ids)} samples can be used; the first, {first.cause}: {first.reason}")
        return Survey(ids, questions, prompts, digest.hexdigest()[:16], sizes, failed)

    def _sketch(self, index: int) -> tuple[dict | Failed, bytes]:
        """A sample, with or without its images, and bytes for their content; a failure if it cannot be read."""
        try:
            return getattr(self.source, "sketch", self._open)(index)
        except Exception as error:
            return failure(texts(self.source, index), error, READING), b"cannot be read"

    def _open(self, index: int) -> tuple[dict, bytes]:
        sample = self.data[index]
        return sample, b"".join(image.tobytes() for image in images_of(sample)) + sample["patches"].numpy().tobytes()

    @cached_property
    def order(self) -> list[int]:
        """Indices of the samples in the order of evaluation, without those that are known to fail."""
        indices = [index for index in range(len(self.data)) if index not in self.survey.failed]
        if not self.sort:
            return indices
        lengths = [len(ids) for ids in self.collate.processor.tokenizer(self.survey.prompts)["input_ids"]]
        sizes = {index: self._sizes(index) if self.by_size else [] for index in indices}
        return sorted(indices, key=lambda index: (len(sizes[index]), sizes[index], lengths[index]), reverse=True)

    def _sizes(self, index: int) -> list[tuple[int, int]]:
        known = self.survey.sizes[index]
        if known is not None:
            return known
        sample = read(self.data, index)
        return [] if isinstance(sample, Failed) else [image.size for image in images_of(sample)]

    def _known_sizes(self, sample: dict) -> list[tuple[int, int]] | None:
        """Sizes of a sample's images, None if unknown; a sample without opened images gets None for each of them."""
        if "image" in sample or "images" in sample:
            return [image.size for image in images_of(sample)]
        known = sample.get("sizes")
        # With unknown sizes: one image per image token of the question, at least one.
        count = max(1, sample["question"].count(self.collate.image_token)) if known is None else len(known)
        sample["images"] = [None] * count
        return None if known is None or None in known else known

    def in_data_order(self, outcomes: list[dict]) -> list[dict]:
        """Outcomes in the order of the data set."""
        return sorted(outcomes, key=lambda outcome: self._index[outcome["id"]])

    def without_images(self) -> "QuestionData":
        """The same questions without their images, with the same scorer and without the data set's own metrics."""
        data = WithoutImages(self.data, self.collate.image_token)
        blind = QuestionData(data, self.collate, self.batch_size, sort=self.sort)
        blind.scorer, blind.generation = self.scorer, self.generation
        return blind

    def scores(self, outcomes: list[dict], folder) -> list:
        """The data set's own metrics, beside accuracy."""
        return self.source.scores(outcomes, folder) if hasattr(self.source, "scores") else []

    def prepare(self) -> Prepare:
        """Function that turns indices of samples into a batch."""
        return Prepare(self.data, self.collate, self.cache)

    def again(self, samples: Sequence[dict]) -> Batch:
        """The same samples as a batch of their own, read again: those of a batch may have lost their pixels."""
        return SafeCollate(self.collate)([read(self.data, self._index[sample["id"]]) for sample in samples])

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.survey.ids)}

    @cached_property
    def batches(self) -> list[list[int]]:
        """Indices of the samples of every batch, whatever is done and in how many processes."""
        return self.in_batches(self.order)

    def in_batches(self, indices: Sequence[int]) -> list[list[int]]:
        """Indices in batches of `batch_size`."""
        return [list(indices[start : start + self.batch_size]) for start in range(0, len(indices), self.batch_size)]

    def missing(self, done: Collection[str], again: Collection[str] = ()) -> list[list[int]]:
        """Batches that are not done as a whole, and batches of the other samples that are tried again.

        done, again  ids of samples
        """
        ids = self.survey.ids
        left = [batch for batch in self.batches if not all(ids[index] in done for index in batch)]
        taken = {index for batch in left for index in batch}
        return left + self.in_batches([index for index in self.order if ids[index] in again and index not in taken])

    def test_dataloader(self) -> Loader:
        """The batches that are left."""
        batches = self.left
        if batches is None:  # without `sort` and failures the order is known without a survey
            batches = self.batches if self.sort or "survey" in vars(self) else self.in_batches(range(len(self.data)))
        return Loader(batches, self.prepare(), self.workers, self.pin)

    def transfer_batch_to_device(self, batch: Batch, device, dataloader_idx: int) -> Batch:
        """Batch with its inputs on a device, or without them where they do not fit."""
        try:
            return batch.to(device)
        except Exception as error:
            if not out_of_memory(error):
                raise
        return replace(batch, inputs={})
