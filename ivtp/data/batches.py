"""From samples to batches that a processor made, left-padded; a LightningDataModule for testing only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ivtp.data.answers import exact
from ivtp.data.errors import DataError
from ivtp.data.failures import PREPARING, READING, Failed, Readable, failure, read, texts

CHAT = "chat"
"""Of `prompt`: the processor's own chat template."""


@dataclass
class Batch:
    """`inputs` for the model; `samples` as the data set gave them; `failed`: those that cannot be evaluated."""

    inputs: dict[str, Tensor]
    samples: list[dict]
    failed: list[Failed] = field(default_factory=list)


def pictures(sample: dict) -> list:
    """The images of a sample: its `images`, else its one `image`."""
    return sample["images"] if "images" in sample else [sample["image"]]


class Collate:
    """Samples → Batch.

    prompt   a template with a place for "{question}" and the image token, each once (the token stands for all images of
             a sample); or "chat": the processor's chat template, for the sample's `messages`, else for a user who shows
             the images and asks the question
    context  the most tokens of a prompt, image tokens included, that the model was made for; None: any number

    Raises DataError, naming the sample, for one that cannot be asked.
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
        texts = [self.render(sample) for sample in samples]
        shown = [images for images in map(pictures, samples) if images]
        if all(len(images) == 1 for images in shown):
            shown = [image for (image,) in shown]
        # A template that writes the begin mark itself must not get a second one from the tokenizer.
        mark = self.processor.tokenizer.bos_token
        more = {"add_special_tokens": False} if self.prompt == CHAT and mark and texts[0].startswith(mark) else {}
        inputs = self.processor(images=shown or None, text=texts, return_tensors="pt", padding=True, **more)
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
        """The prompt of a sample as text, one image token for each of its images."""
        text = self._filled(sample)
        if self.context and len(text) > self.context:  # only then, since it takes time
            self._check_length(sample, len(self.processor.tokenizer(text)["input_ids"]), "before its images")
        return text

    def _filled(self, sample: dict) -> str:
        question, images = sample["question"], len(pictures(sample))
        if not question.strip():
            raise DataError(f"sample {sample['id']!r} has an empty question")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise DataError(f"sample {sample['id']!r}: its question holds half of a surrogate pair, which is no text")
        placed = question.count(self.image_token)
        if placed and ("images" not in sample or placed != images):
            raise DataError(
                f"sample {sample['id']!r}: its question contains the image token {self.image_token!r}"
                + (f" {placed} times, but it has {images} images" if "images" in sample else "")
            )
        if self.prompt == CHAT:
            content = [*[{"type": "image"}] * (images - placed), {"type": "text", "text": question}]
            messages = sample.get("messages") or [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens, template = " ".join([self.image_token] * (images - placed)), self.prompt
        if not tokens:  # the space behind it goes too
            template = re.sub(re.escape(self.image_token) + r"\s*", "", template)
        return template.replace(self.image_token, tokens).replace("{question}", question)


@dataclass(frozen=True)
class Together:
    """Samples and failures, as they were read → Batch. A sample that cannot be prepared fails; the others do not notice."""

    collate: Callable[[list[dict]], Batch]

    def __call__(self, items: list[dict | Failed]) -> Batch:
        failed = [item for item in items if isinstance(item, Failed)]
        samples = [item for item in items if not isinstance(item, Failed)]
        while samples:
            try:
                return replace(self.collate(samples), failed=failed)
            except Exception:
                found = [self.alone(sample) for sample in samples]
                if not any(found):  # each can be prepared alone, so that none of them is the cause
                    raise
            samples = [sample for sample, reason in zip(samples, found, strict=True) if reason is None]
            failed += [reason for reason in found if reason is not None]
        return Batch({}, [], failed)

    def alone(self, sample: dict) -> Failed | None:
        """Failure of a sample that cannot be prepared, None for one that can."""
        try:
            self.collate([sample])
        except Exception as error:
            return failure(sample, error, PREPARING)
        return None


@dataclass(frozen=True)
class Survey:
    """Facts about all samples that a run needs before the first; `hash` covers ids, texts, images and asked patches.

    prompts  the questions as the model reads them, with one image token for an image
    sizes    of the images of each sample; None: they were not opened
    failed   place → why the sample cannot be evaluated, as far as that is known already; its prompt is empty
    """

    ids: list[str]
    questions: list[str]
    prompts: list[str]
    hash: str
    sizes: list[list[tuple[int, int]] | None]
    failed: dict[int, Failed] = field(default_factory=dict)


class WithoutImages(Dataset):
    """Samples of a data set without their images and image tokens, for blind accuracy."""

    def __init__(self, data: Dataset, image_token: str) -> None:
        self.data, self.image_token = data, image_token

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> dict:
        sample = {name: value for name, value in self.data[place].items() if name != "image"}
        if "messages" in sample:
            sample["messages"] = [
                {**m, "content": [part for part in m["content"] if part["type"] == "text"]} for m in sample["messages"]
            ]
        question = sample["question"].replace(self.image_token, "").strip()
        return sample | {"images": [], "question": question, "patches": torch.zeros_like(sample["patches"])}


class QuestionData(L.LightningDataModule):
    """A data set for testing; `done` holds ids that have their outcome already.

    sort     longest prompts first, so that those of a batch are alike and little is padded; `by_size`: those whose images
             have the same sizes side by side, for models that read images of several sizes
    A data set may bring more than items: `judge(sample, text)` → fields of an outcome (see `exact`), `generation`, settings
    of `generate`; `scores(outcomes, folder)`, metrics of its own; `about`, what its results depend on; `sketch(place)` →
    a sample without its images, and bytes that stand for their content, where that is cheaper than opening them.
    """

    def __init__(
        self,
        data: Dataset,
        collate: Collate,
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
        self.data = data if limit is None else Subset(data, range(min(limit, len(data))))
        self.collate, self.batch_size, self.sort, self.by_size = collate, batch_size, sort, by_size
        self.judge = getattr(data, "judge", exact)
        self.generation, self.about = dict(getattr(data, "generation", {})), dict(getattr(data, "about", {}))
        self.done: Collection[str] = ()

    @cached_property
    def survey(self) -> Survey:
        """Every sample looked at once: opening its image may be the dearest part of a start."""
        ids, questions, prompts, sizes, digest, failed = [], [], [], [], hashlib.sha256(), {}
        for place in range(len(self.data)):
            sample, content = self._sketched(place)
            if isinstance(sample, Failed):
                failed[place], sample = sample, sample.sample
                sizes.append(None)
            else:
                sizes.append(self._known_sizes(sample))
                try:
                    prompts.append(self.collate.render(sample))
                except Exception as error:
                    failed[place] = failure(sample, error, PREPARING)
            if place in failed:
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

    def _sketched(self, place: int) -> tuple[dict | Failed, bytes]:
        """A sample with or without its images and what stands for their content; of one that cannot be read, that."""
        try:
            return getattr(self.source, "sketch", self._open)(place)
        except Exception as error:
            return failure(texts(self.source, place), error, READING), b"cannot be read"

    @cached_property
    def order(self) -> list[int]:
        """The places of the samples in the order in which they are asked, but of those that are known to fail."""
        places = [place for place in range(len(self.data)) if place not in self.survey.failed]
        if not self.sort:
            return places
        lengths = [len(ids) for ids in self.collate.processor.tokenizer(self.survey.prompts)["input_ids"]]
        sizes = {place: self._sizes(place) if self.by_size else [] for place in places}
        return sorted(places, key=lambda place: (len(sizes[place]), sizes[place], lengths[place]), reverse=True)

    def _sizes(self, place: int) -> list[tuple[int, int]]:
        known = self.survey.sizes[place]
        if known is not None:
            return known
        sample = read(self.data, place)
        return [] if isinstance(sample, Failed) else [image.size for image in pictures(sample)]

    def _known_sizes(self, sample: dict) -> list[tuple[int, int]] | None:
        """Sizes of a sample's images, None if they are not known; one whose images were not opened gets places for them."""
        if "image" in sample or "images" in sample:
            return [image.size for image in pictures(sample)]
        known = sample.get("sizes")
        # Where nothing is known, as many as the question has places for, at least one.
        count = max(1, sample["question"].count(self.collate.image_token)) if known is None else len(known)
        sample["images"] = [None] * count
        return None if known is None or None in known else known

    def as_they_come(self, outcomes: list[dict]) -> list[dict]:
        """Outcomes in the order of the data set, in whichever they were asked."""
        place = {name: place for place, name in enumerate(self.survey.ids)}
        return sorted(outcomes, key=lambda outcome: place[outcome["id"]])

    def _open(self, place: int) -> tuple[dict, bytes]:
        sample = self.data[place]
        return sample, b"".join(image.tobytes() for image in pictures(sample)) + sample["patches"].numpy().tobytes()

    def without_images(self) -> QuestionData:
        """The same questions without their images, judged alike; metrics of the data set's own are left out."""
        data = WithoutImages(self.data, self.collate.image_token)
        blind = QuestionData(data, self.collate, self.batch_size, sort=self.sort)
        blind.judge, blind.generation = self.judge, self.generation
        return blind

    def scores(self, outcomes: list[dict], folder) -> list:
        """Metrics of the data set's own, beside accuracy."""
        return self.source.scores(outcomes, folder) if hasattr(self.source, "scores") else []

    def samples(self) -> Iterator[dict]:
        """All samples, done or not."""
        return (self.data[i] for i in range(len(self.data)))

    def test_dataloader(self) -> DataLoader:
        places: Sequence[int] = range(len(self.data))
        if self.done or self.sort:
            places = [place for place in self.order if self.survey.ids[place] not in self.done]
        return DataLoader(Readable(self.data, places), batch_size=self.batch_size, collate_fn=Together(self.collate))

    def transfer_batch_to_device(self, batch: Batch, device, dataloader_idx: int) -> Batch:
        return Batch({name: value.to(device) for name, value in batch.inputs.items()}, batch.samples, batch.failed)
