"""Batches of samples as they travel: from a worker, into pinned memory, to a device, to a cache on disk and back."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ivtp.data.failures import PREPARING, Failed, failure, read

LARGE = 1 << 18
"""Bytes above which a tensor goes through shared memory."""


class Pickler(pickle.Pickler):
    """Pickler that writes tensors as arrays, which is ten times faster than torch's own way for small ones."""

    def reducer_override(self, value: Any) -> Any:
        """Reduce a tensor that numpy has a type for; leave all else to pickle."""
        if type(value) is not Tensor or value.dtype == torch.bfloat16:
            return NotImplemented
        return torch.from_numpy, (value.numpy(),)


def packed(value: object) -> bytes:
    """A value as bytes."""
    content = BytesIO()
    Pickler(content, pickle.HIGHEST_PROTOCOL).dump(value)
    return content.getvalue()


class ImageSize(NamedTuple):
    """Stand-in for the image of a prepared sample: its width and height, without its pixels."""

    size: tuple[int, int]


@dataclass
class Batch:
    """Batch of samples: `inputs` of the model, the `samples`, and those that `failed` before the model.

    Without inputs, though there are samples, it did not fit into the device's memory.

    place  place of the batch in a `BatchCache` in which a worker has stored it
    """

    inputs: dict[str, Tensor]
    samples: list[dict]
    failed: list[Failed] = field(default_factory=list)
    place: Any = None

    def __reduce__(self) -> tuple:
        # Tensors go through shared memory with an open file for each, for which the main process asks the worker: good for
        # pixels, not for the many small ones. Photographs would take longer to send than the inputs made of them.
        large = {name: value for name, value in self.inputs.items() if value.nbytes > LARGE}
        small = {name: value for name, value in self.inputs.items() if value.nbytes <= LARGE}
        return receive, (large, packed(small), list(self.inputs), self.texts(), self.place)

    def texts(self) -> bytes:
        """Samples and failures as bytes, with the sizes of images in place of their pixels."""
        failed = [replace(failed, sample=without_pixels(failed.sample)) for failed in self.failed]
        return packed(([without_pixels(sample) for sample in self.samples], failed))

    def pin_memory(self) -> Batch:
        """The batch with its inputs in pinned memory, from which a GPU copies while it computes."""
        return replace(self, inputs={name: value.pin_memory() for name, value in self.inputs.items()})

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its inputs on a device."""
        inputs = {name: value.to(device, non_blocking=value.is_pinned()) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs)


def receive(large: dict[str, Tensor], small: bytes, names: list[str], texts: bytes, place: Any) -> Batch:
    """Batch from what was sent of it; `names`: of its inputs in their order."""
    inputs = large | pickle.loads(small)
    return unpack({name: inputs[name] for name in names}, texts, place)


def unpack(inputs: dict[str, Tensor], texts: bytes, place: Any = None) -> Batch:
    """Batch from its inputs and its `texts`."""
    return Batch(inputs, *pickle.loads(texts), place=place)


def images_of(sample: dict) -> list:
    """Images of a sample: its `images`, else its one `image`."""
    return sample["images"] if "images" in sample else [sample["image"]]


def without_pixels(sample: dict) -> dict:
    """Sample with the sizes of its images in place of the images."""
    sizes: dict[str, Any] = {}
    if sample.get("image") is not None:
        sizes["image"] = ImageSize(sample["image"].size)
    if sample.get("images"):
        sizes["images"] = [ImageSize(image.size) for image in sample["images"]]
    return sample | sizes


@dataclass(frozen=True)
class SafeCollate:
    """Collate samples and failures; a sample that cannot be prepared becomes a failure and leaves the others untouched."""

    collate: Callable[[list[dict]], Batch]

    def __call__(self, items: list[dict | Failed]) -> Batch:
        """Collate the items of a batch."""
        failed = [item for item in items if isinstance(item, Failed)]
        samples = [item for item in items if not isinstance(item, Failed)]
        while samples:
            try:
                return replace(self.collate(samples), failed=failed)
            except Exception as error:
                reasons = [self.alone(sample) for sample in samples]
                if not any(reasons):  # each can be prepared alone, so that none of them is the cause
                    error.add_note(f"samples {', '.join(repr(sample['id']) for sample in samples)}")
                    raise
            samples = [sample for sample, reason in zip(samples, reasons, strict=True) if reason is None]
            failed += [reason for reason in reasons if reason is not None]
        return Batch({}, [], failed)

    def alone(self, sample: dict) -> Failed | None:
        """Failure of a sample that cannot be prepared alone; None if it can."""
        try:
            self.collate([sample])
        except Exception as error:
            return failure(sample, error, PREPARING)
        return None


@dataclass(frozen=True)
class Prepare:
    """Read, decode and process the samples at some indices of a data set.

    cache  holds the batches that were prepared before; None: each is prepared anew
    """

    data: Any
    collate: Callable[[list[dict]], Batch]
    cache: Any = None

    def __call__(self, indices: Sequence[int]) -> Batch:
        """The samples at these indices as a batch."""
        if self.cache is not None and (batch := self.cache.read(indices)) is not None:
            return batch
        batch = SafeCollate(self.collate)([read(self.data, index) for index in indices])
        # A sample that failed is tried again by every row: a file may have been mended.
        return batch if self.cache is None or batch.failed else self.cache.write(indices, batch)
