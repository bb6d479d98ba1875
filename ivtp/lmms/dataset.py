"""A benchmark task of lmms-eval as a data set: its documents, prompts, post-processing and metrics.

lmms-eval's own functions do all of it, in the order of its evaluator (arXiv 2407.12772): build the request of a document,
filter the answer, strip reasoning, process the result; at the end, aggregate.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image, ImageFile
from torch.utils.data import Dataset

from ivtp.data.failures import DataError, Failed, first_line, read
from ivtp.data.open_image import DEEP, eight_bit
from ivtp.lmms.generation import generation_settings, stop_texts, truncate
from ivtp.lmms.judges import JudgeError, grading, judge_variables
from ivtp.lmms.loading import load_task
from ivtp.registry import UnknownName, unknown

THOUGHTS: Any = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]
"""Tags of reasoning that lmms-eval's command removes from answers by default."""
TRIED = 8
"""Documents tried before a run, until one can be read."""
UNREADABLE = "§"
"""Answer that no rule can parse."""


@dataclass(frozen=True)
class Score:
    """One metric of a task: `aggregate` of the `values` of all documents.

    singles   number of each document alone, where the task defines one
    clusters  image of each value
    sampled   may be computed again on parts of the documents: calls no judge and writes no file
    main      the run's main metric
    """

    name: str
    values: list
    singles: list[float] | None
    clusters: list[str]
    aggregate: Callable[[Sequence], float | None]
    sampled: bool
    main: bool


def macro_average(score: Score, families: Sequence[str]) -> Score:
    """Mean of a metric over the families of its documents, computed per family."""
    wanted = sorted(set(families))

    def aggregate(pairs: Sequence[tuple[str, object]]) -> float | None:
        by_family = {family: [value for own, value in pairs if own == family] for family in wanted}
        if not all(by_family.values()):
            raise DataError(f"{score.name} has no document of a family left to average over")
        means = [mean for values in by_family.values() if (mean := score.aggregate(values)) is not None]
        return sum(means) / len(means) if len(means) == len(by_family) else None

    pairs = list(zip(families, score.values, strict=True))
    return replace(score, name=f"{score.name}, macro average", values=pairs, singles=None, aggregate=aggregate)


def request_fields(visuals: Sequence | None, text: str, chat: bool) -> dict:
    """Fields of a sample: `images` and `question`; for chat also `messages`, without the images in them.

    visuals  result of `doc_to_visual`, or with `chat` of `doc_to_messages`
    text     the prompt, without `chat`
    """
    fields: dict[str, Any] = {"question": text}
    images = visuals = list(visuals or [])
    if chat:
        parts = [part for message in visuals for part in message["content"]]
        images = [part["url"] for part in parts if part["type"] != "text"]
        bare = [
            {**message, "content": [p if p["type"] == "text" else {"type": "image"} for p in message["content"]]}
            for message in visuals
        ]
        fields = {"question": "\n".join(p["text"] for p in parts if p["type"] == "text"), "messages": bare}
    for image in images:
        if not isinstance(image, Image.Image):
            raise DataError(f"it shows a {type(image).__name__}, and only images can be pruned here")
    # As in lmms-eval's own models, but for 16 bits and floats, which those clip to white or black.
    images = [eight_bit(image) if image.mode.startswith(DEEP) else image for image in images]
    return fields | {"images": [image.convert("RGB") for image in images]}


@dataclass(frozen=True)
class TaskSettings:
    """Settings of a benchmark task, as the keys of `data=lmms`.

    path    folder with a copy of its data set, or another hub id; default: the data set on the hub
    preset  which of the task's prompts; prompt: single settings of it, over its own
    generation  settings of generate, over the task's own
    metric  the main metric, or several whose sum is the main metric; default: the task's first
    alone   a document is correct where its metric alone is 1 (or 100), for tasks that give documents no score
    family  column of the documents by which accuracy is broken down
    macro   the main metric is the mean of the metric over the families, beside the metric over all documents
    judge   environment variables of the judge that some tasks ask
    limit   documents, the first ones; default: all
    """

    path: str | None = None
    preset: str = "default"
    prompt: Mapping | None = None
    generation: Mapping | None = None
    metric: str | Sequence[str] | None = None
    alone: bool = False
    family: str | None = None
    macro: bool = False
    judge: Mapping | None = None
    limit: int | None = None


class LmmsTask(Dataset):
    """One benchmark task. Items have the fields of `Scenes2`, but `images`, a list, for `image`; with `chat` also `messages`.

    patches  number of patches of an image (target patches are unknown)
    """

    def __init__(self, name: str, patches: int, settings: TaskSettings, *, chat: bool = False) -> None:
        from lmms_eval.api.reasoning import parse_reasoning_tags_config

        self.name, self.patches, self.settings, self.chat = name, patches, settings, chat
        if settings.macro and settings.family is None:
            raise DataError("data.macro=true averages over families; name their column, as in data.family=category")
        self._judge = judge_variables(settings.judge)
        self.task = load_task(name, settings.path, settings.preset, settings.prompt, chat, self._judge)
        self.tags = parse_reasoning_tags_config(THOUGHTS, self.task.config.reasoning_tags)
        generation = {**(self.task.config.generation_kwargs or {}), **(settings.generation or {})}
        self.generation, self.until = generation_settings(generation), stop_texts(generation)
        self.main = self._main(settings.metric)
        self.requests = self._requests(settings.limit)
        self.indices = {self._id(index): index for index in range(len(self))}
        self._try()

    @property
    def about(self) -> dict:
        """Facts that the results depend on, beside the documents."""
        from importlib.metadata import version

        config = self.task.config
        return {
            "lmms_eval": version("lmms_eval"),
            "dataset": config.dataset_path,
            "commits": self.task.commits,
            "split": config.test_split or config.validation_split,
            "generation": self.generation,
        }

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> dict:
        function = self.task.doc_to_messages if self.chat else self.task.doc_to_visual
        # Some data sets have truncated images; lmms-eval shows them as far as they go.
        whole = patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with self._failing(f"cannot show document {index}"), whole:
            fields = request_fields(function(self.task.eval_docs[index]), self.requests[index].args[0], self.chat)
        patches = torch.zeros(self.patches, dtype=torch.bool)
        return self._text(index) | fields | {"image_id": self._image_id(index), "patches": patches}

    def sketch(self, index: int) -> tuple[dict, bytes]:
        """Fields of an item without its images, and a hash of its document and image files, which are not opened."""
        doc = json.dumps(self._plain[index], sort_keys=True, default=lambda value: type(value).__name__)
        digest = hashlib.sha256(doc.encode())
        digest.update(self._image_id(index).encode())
        return self._text(index), digest.digest()

    def texts(self, index: int) -> dict:
        """Fields of an item without its images, as far as its document can be read."""
        known = {"id": self._id(index), "image_id": self._id(index), "question": self.requests[index].args[0]}
        for fields in (self._text, lambda index: {"image_id": self._image_id(index)}):
            with suppress(DataError, OSError):
                known |= fields(index)
        return known

    def scorer(self, sample: dict, text: str) -> dict:
        """Score an answer: the value of each of the task's metrics for this document, and correctness."""
        index, text = self.indices[sample["id"]], truncate(text, self.until)
        doc = self._plain[index]
        with self._grading(f"cannot score the answer to document {index}"):
            values = self._process(index, doc, text)
        outcome = {"answer": sample["answer"], "prediction": text.strip(), "correct": self._correct(values)}
        try:
            stored = json.loads(json.dumps(values, default=lambda value: value.tolist()), parse_constant=lambda _: None)
        except (TypeError, AttributeError) as error:
            raise DataError(f"task {self.name!r}: its results cannot be kept as JSON ({error})") from error
        return outcome | {"scores": stored}

    def scores(self, outcomes: Sequence[dict], folder: Path) -> list[Score]:
        """Metrics of the task over all outcomes; files that it writes (submissions) go below `folder`."""
        outcomes = sorted((o for o in outcomes if o["id"] in self.indices), key=lambda o: self.indices[o["id"]])
        names = dict.fromkeys(key for outcome in outcomes for key in outcome["scores"])
        kinds = list(dict.fromkeys(name.rpartition(",")[2] for name in names))
        scores = []
        for name in names:
            metric, _, kind = name.rpartition(",")
            if metric not in self.task.aggregation():
                continue
            having = [outcome for outcome in outcomes if name in outcome["scores"]]
            values = [outcome["scores"][name] for outcome in having]
            singles = [single for value in values if (single := self._single(value)) is not None]
            aggregate = self.task.aggregation()[metric]
            plain = "args" not in inspect.signature(aggregate).parameters
            score = Score(
                name=f"{self.name}/{metric}" + ("" if kind == "none" else f",{kind}"),
                values=values,
                singles=singles if len(singles) == len(values) else None,
                clusters=[outcome["image"] for outcome in having],
                aggregate=lambda values, aggregate=aggregate: self._aggregate(aggregate, values, folder),
                sampled=plain and self._judge is None,
                main=metric in self.main and kind == kinds[0],
            )
            scores.append(score)
            if self.settings.macro and score.main:
                families = [str(self._plain[self.indices[outcome["id"]]][self.settings.family]) for outcome in having]
                scores[-1:] = [replace(score, main=False), macro_average(score, families)]
        return scores

    # Calls of lmms-eval -------------------------------------------------------------------------------------------

    def _main(self, metric) -> list[str]:
        known = list(self.task.aggregation())
        chosen = [metric] if isinstance(metric, str) else list(metric or known[:1])
        for name in chosen:
            if name not in known:
                raise UnknownName(unknown(f"metric of task {self.name!r}:", name, known))
        return chosen

    def _requests(self, limit: int | None) -> list:
        if self.task.config.num_fewshot is None:
            self.task.set_config("num_fewshot", 0)
        self.task.set_fewshot_seed(1234)  # as its evaluator does
        with redirect_stderr(StringIO()), self._failing("cannot ask about its documents"):
            self.task.build_all_requests(limit=limit)
        return self.task.instances

    def _process(self, index: int, doc: dict, text: str) -> dict:
        """Metric and filter → value, as in `lmms_eval.evaluator`."""
        from lmms_eval.api.instance import Instance
        from lmms_eval.api.reasoning import strip_reasoning_tags

        request = self.requests[index]
        answered = Instance(request.request_type, request.arguments, 0, request.metadata, resps=[text])
        for ensemble in self.task._filters:
            ensemble.apply([answered], [doc])
        values = {}
        for kind, answer in answered.filtered_resps.items():
            several = isinstance(answer, list)
            answers = [
                strip_reasoning_tags(a, self.tags) if isinstance(a, str) and self.tags else a
                for a in (answer if several else [answer])
            ]
            processed = self.task.process_results(doc, [answers if several else answers[0]])
            values |= {f"{metric},{kind}": value for metric, value in processed.items()}
        return values

    def _aggregate(self, aggregate: Callable, values: Sequence, folder: Path) -> float | None:
        writes = "args" in inspect.signature(aggregate).parameters
        more = {"args": SimpleNamespace(output_path=str(folder))} if writes else {}
        with self._grading(f"cannot aggregate {len(values)} documents"):
            value = aggregate(values, **more)
        return float(value) if isinstance(value, (int, float)) or hasattr(value, "item") else None

    def _correct(self, values: dict) -> bool | float | None:
        """Correctness for the paired statistics: the main metric of this document, if it is between 0 and 1."""
        for name, value in values.items():
            metric = name.rpartition(",")[0]
            if metric not in self.main:
                continue
            single = self._single(value)
            if single is None and self.settings.alone:
                with TemporaryDirectory() as folder:
                    single = self._aggregate(self.task.aggregation()[metric], [value], Path(folder))
                if single not in (0, 1, 100):
                    raise DataError(f"data.alone=true, but {metric} of one document alone is {single}, not 0, 1 or 100")
                single = min(single, 1)
            if single is None or not 0 <= single <= 1:
                return None
            return bool(single) if single in (0, 1) else float(single)
        return None

    def _single(self, value: Any) -> float | None:
        """Score of one document: the value itself, or the field of it that the task names."""
        if isinstance(value, Mapping):
            value = value.get(self.task.config.score_key)
        is_number = isinstance(value, (int, float)) or hasattr(value, "item")
        return float(value) if is_number and math.isfinite(float(value)) else None

    def _try(self) -> None:
        """Show and score one document (the first that can be read) before a model runs, to find errors of task and judge."""
        tried = (read(self, index) for index in range(min(TRIED, len(self))))
        sample = next((sample for sample in tried if not isinstance(sample, Failed)), None) or self[0]
        values = self.scorer(sample, UNREADABLE)["scores"]
        with TemporaryDirectory() as folder:
            for name, value in values.items():
                aggregate = self.task.aggregation().get(name.rpartition(",")[0])
                if aggregate is None:
                    continue
                try:
                    self._aggregate(aggregate, [value], Path(folder))
                except JudgeError:
                    raise
                except DataError:  # one document may be too few for a metric
                    continue

    @contextmanager
    def _grading(self, what: str) -> Iterator[None]:
        with grading(self._judge, self.name), self._failing(what):
            yield

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            with self.task.loading():  # some tasks load the images of a document only when they show it
                yield
        except Exception as error:  # anything: it is the task's own code
            raise DataError(f"task {self.name!r} {what}: {first_line(error)}") from error

    # Documents -----------------------------------------------------------------------------------------------------

    def _id(self, index: int) -> str:
        return f"{self.name}-{index:06d}"

    def _text(self, index: int) -> dict:
        doc = self._plain[index]
        if self.settings.family is not None and self.settings.family not in doc:
            raise UnknownName(unknown(f"column of task {self.name!r}:", self.settings.family, map(str, doc)))
        return {
            "id": self._id(index),
            "question": self.requests[index].args[0],
            "answer": self._answer(index, doc),
            "family": str(doc[self.settings.family]) if self.settings.family is not None else "all",
        }

    def _answer(self, index: int, doc: dict) -> str:
        with self._failing(f"cannot say the answer of document {index}"):
            answer = str(self.task.doc_to_target(doc))
        # Some tasks name a column that does not exist: their answers are in the processed result.
        return "" if answer == self.task.config.doc_to_target else answer

    @property
    def _plain(self):
        """Documents for the processing of results: without images, unless the task needs them."""
        return self.task.eval_docs_no_media

    @cached_property
    def _raw(self):
        return self.task.eval_docs.with_format("arrow")

    def _image_id(self, index: int) -> str:
        """Hash of the document's image files, so that questions about one image form a cluster; else the document's id."""
        row, digest, images = self._raw[index], hashlib.sha256(), 0
        for column in row.column_names:
            for cell in row.column(column).to_pylist():
                for image in cell if isinstance(cell, list) else [cell]:
                    if isinstance(image, dict) and set(image) == {"bytes", "path"}:
                        images += 1
                        digest.update(
                            image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
                        )
        return digest.hexdigest()[:16] if images else self._id(index)
