"""The loop of a run over its model alone: whether decoding and processors keep up with a device, waited for or real."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from PIL import Image

from ivtp import results as store
from ivtp.backbones import shape_of
from ivtp.data.batches import Batch
from ivtp.data.datamodule import Collate, QuestionData
from ivtp.data.questions import Questions
from ivtp.evaluation.answering import Answer
from ivtp.evaluation.isolated import Isolated, OutcomeWriter
from ivtp.pruners import load_pruner
from ivtp.timing.measure import Run, interleave, ratio
from ivtp.timing.models import LLAVA_7B, LLAVA_NEXT_7B, Size, tokenizer

SIZE = (640, 480)
WORDS = 40
"""Words of a question."""
CPU = torch.device("cpu")
TOKENS = 8
"""Tokens of an answer."""
PROCESSORS = {"clip": LLAVA_7B, "llava_next": LLAVA_NEXT_7B}
"""Models whose processors are timed."""


@dataclass(frozen=True)
class Load:
    """Work of one run: `images` in batches of `batch`, each of which keeps a device busy for `wait` seconds."""

    images: int = 500
    batch: int = 10
    wait: float = 0.020
    workers: tuple[int, ...] = (0, 1, 2, 4)


class Waiting(Isolated):
    """Test module whose step takes the time of a GPU and leaves the cores alone."""

    def __init__(self, wait: float) -> None:
        super().__init__(collate=None)
        self.wait = wait

    def outcomes(self, batch: Batch) -> list[dict]:
        """One outcome per sample, when the device would be done with the batch."""
        time.sleep(self.wait * len(batch.samples))
        return [{"id": sample["id"], "correct": True} for sample in batch.samples]


def pipeline(load: Load, rounds: int, processors: Sequence[str] = tuple(PROCESSORS)) -> dict:
    """Images per second of the model on ready batches and of the loop with each number of workers, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, load.images)
        waiting = Waiting(load.wait)
        return {name: over_model(waiting, processor_of(PROCESSORS[name]), folder, load, rounds) for name in processors}


def end_to_end(model: Any, size: Size, keep: int, load: Load, rounds: int) -> dict:
    """The same with a model in place of the waiting: images per second unpruned and under IVTP, answers of TOKENS tokens."""
    processor = processor_of(size)
    generation = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, load.images)
        found = {}
        shape = shape_of(model)
        plans = {"unpruned": load_pruner("none", shape), "ivtp": load_pruner("ivtp", shape, keep=keep)}
        for label, plan in plans.items():
            module = Answer(model, processor, plan, generation=generation)
            found[label] = over_model(module, processor, folder, load, rounds, model.device)
    return found | {"tokens": TOKENS}


def over_model(
    module: Isolated, processor: Any, folder: Path, load: Load, rounds: int, device: torch.device = CPU
) -> dict:
    """Images per second of the model alone and of the loop, for one processor."""
    data = QuestionData(Questions(folder), Collate(processor, "<image> {question}"), load.batch)
    ready = [batch.to(device) for batch in data.test_dataloader()]
    data.pin = device.type == "cuda"
    where = {"accelerator": "gpu", "devices": [device.index or 0]} if data.pin else {"accelerator": "cpu", "devices": 1}

    def model() -> None:
        for number, batch in enumerate(ready):
            module.test_step(batch, number)

    def loop(workers: int) -> None:
        data.workers = workers
        extras = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        written = OutcomeWriter(lambda outcomes: store.append(folder / f"outcomes-{workers}.jsonl", outcomes))
        trainer = Trainer(callbacks=[written], **where, **dict.fromkeys(extras, False))
        trainer.test(module, datamodule=data, verbose=False)

    runs: dict[str, Run] = {"model": Run(model)}
    runs |= {str(workers): Run(lambda workers=workers: loop(workers)) for workers in load.workers}
    module.test_step(ready[0], 0)
    seconds = interleave(runs, rounds, device, warmup=0)
    return {
        "images": load.images,
        "batch": load.batch,
        "wait": load.wait,
        "images_per_second": {name: load.images / median(values) for name, values in seconds.items()},
        "over_model": {name: ratio(seconds["model"], seconds[name]) for name in seconds if name != "model"},
    }


def write_photographs(folder: Path, count: int) -> None:
    """Write a folder of questions about JPEG files of 640 × 480 pixels, as large as those of photographs."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        fine = generator.normal(0, 8, (SIZE[1], SIZE[0], 3))
        image = Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number}.jpg", quality=90)
        question = " ".join(map(str, generator.integers(10, 1000, WORDS)))
        lines.append(json.dumps({"id": number, "image": f"{number}.jpg", "question": question, "answer": "0"}))
    (folder / "questions.jsonl").write_text("\n".join(lines))


def processor_of(size: Size) -> Any:
    """The processor of a LLaVA or LLaVA-NeXT of these sizes, with a tokenizer of whole words."""
    from transformers import CLIPImageProcessor, LlavaNextImageProcessor, LlavaNextProcessor, LlavaProcessor

    side, config = size.vision["image_size"], size.config()
    images: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    kind: Any = LlavaProcessor
    image_processor: Any = CLIPImageProcessor(**images)
    if size.crops:
        kind = LlavaNextProcessor
        image_processor = LlavaNextImageProcessor(**images, image_grid_pinpoints=config.image_grid_pinpoints)
    more = {"patch_size": size.vision["patch_size"], "vision_feature_select_strategy": "default"}
    words = tokenizer(min(1000, size.text["vocab_size"]))
    return kind(image_processor, words, **more, num_additional_image_tokens=1)
