"""A benchmark of lmms-eval as a data set: its documents, prompts, post-processing and metrics.

All of it is done by lmms-eval's own functions, in the order of its evaluator (arXiv 2407.12772): build the request of a
document, filter the answer, strip what a model thought aloud, process the result; at the end, aggregate.
"""

from __future__ import annotations

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
from unittest.mock import patch

import torch
from PIL import Image, ImageFile
from torch.utils.data import Dataset

from ivtp.data.errors import DataError, first_line
from ivtp.data.failures import Failed, read
from ivtp.data.generation import cut, settings, stops
from ivtp.data.judges import JudgeError, checked, judged_by
from ivtp.data.lmms_tasks import load_task
from ivtp.data.open_image import DEEP, eight_bit
from ivtp.registry import UnknownName, unknown

THOUGHTS = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]
"""What lmms-eval's command takes out of answers unless told otherwise."""
TRIED = 8
"""Documents that are tried before a run, until one can be read."""
UNREADABLE = "§"
"""An answer that no rule makes anything of, to see what a task then does."""


@dataclass(frozen=True)
class Score:
    """One metric of a task: what `aggregate` makes of the `values` of all documents.

    singles   what each document is worth alone, a number, where the task says so
    clusters  of each value: which image it is about
    sampled   it may be worked out again on parts of the documents: it asks no judge and writes no file
    main      the metric that the run is about
    """

    name: str
    values: list
    singles: list[float] | None
    clusters: list[str]
    aggregate: Callable[[Sequence], float | None]
    sampled: bool
    main: bool


def macro_average(score: Score, families: Sequence[str]) -> Score:
    """The mean of a metric over the families of its documents, each family on its own."""
    wanted = sorted(set(families))

    def aggregate(pairs: Sequence[tuple[str, object]]) -> float | None:
        by_family = {family: [value for own, value in pairs if own == family] for family in wanted}
        if not all(by_family.values()):
            raise DataError(f"{score.name} has no document of a family left to average over")
        means = [score.aggregate(values) for values in by_family.values()]
        return None if None in means else sum(means) / len(means)

    pairs = list(zip(families, score.values, strict=True))
    return replace(score, name=f"{score.name}, macro average", values=pairs, singles=None, aggregate=aggregate)


def shown(visuals: Sequence | None, text: str, chat: bool) -> dict:
    """What a sample shows: `images` and `question`; of messages also those, without the images in them.

    visuals  what `doc_to_visual` gave, or with `chat` what `doc_to_messages` gave; text: the prompt, where it is not chat
    """
    more: dict = {"question": text}
    if chat:
        parts = [part for message in visuals for part in message["content"]]
        images = [part["url"] for part in parts if part["type"] != "text"]
        bare = [
            {**message, "content": [p if p["type"] == "text" else {"type": "image"} for p in message["content"]]}
            for message in visuals
        ]
        more = {"question": "\n".join(p["text"] for p in parts if p["type"] == "text"), "messages": bare}
    else:
        images = list(visuals or [])
    for image in images:
        if not isinstance(image, Image.Image):
            raise DataError(f"it shows a {type(image).__name__}, and only images can be pruned here")
    # As lmms-eval's own models convert them, but for 16 bits and floats, which that clips to white or black.
    images = [eight_bit(image) if image.mode.startswith(DEEP) else image for image in images]
    return more | {"images": [image.convert("RGB") for image in images]}


class LmmsTask(Dataset):
    """One task. Items have the fields of `Scenes2`, but `images`, a list, in place of `image`; with `chat` also `messages`.

    patches  how many patches an image has (nobody knows which of them are asked about)
    metric   the metric or metrics (their sum) that the run is about; default: the task's first
    alone    a document is right where the metric of it alone says 0 or 1 (or 100), for tasks that give it no score
    family   the column of the documents that accuracy is broken down by
    macro    the run is about the macro average of the metric: its mean over the families, beside the metric over all
    """

    def __init__(
        self,
        name: str,
        patches: int,
        *,
        path: str | None = None,
        preset: str = "default",
        prompt: Mapping | None = None,
        generation: Mapping | None = None,
        metric: str | Sequence[str] | None = None,
        alone: bool = False,
        family: str | None = None,
        macro: bool = False,
        judge: Mapping | None = None,
        chat: bool = False,
        limit: int | None = None,
    ) -> None:
        from lmms_eval.api.reasoning import parse_reasoning_tags_config

        self.name, self.patches, self.alone, self.family, self.chat = name, patches, alone, family, chat
        if macro and family is None:
            raise DataError("data.macro=true averages over families; name their column, as in data.family=category")
        self.macro, self._judge = macro, checked(judge)
        self.task = load_task(name, path, preset, prompt, chat, self._judge)
        self.tags = parse_reasoning_tags_config(THOUGHTS, self.task.config.reasoning_tags)
        asked = {**(self.task.config.generation_kwargs or {}), **(generation or {})}
        self.generation, self.until = settings(asked), stops(asked)
        self.main = self._main(metric)
        self.requests = self._requests(limit)
        self.places = {self._id(place): place for place in range(len(self))}
        self._try()

    @property
    def about(self) -> dict:
        """What the results depend on beside the documents."""
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

    def __getitem__(self, place: int) -> dict:
        function = self.task.doc_to_messages if self.chat else self.task.doc_to_visual
        # Some data sets have images whose end is missing; lmms-eval shows them as far as they go.
        whole = patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with self._failing(f"cannot show document {place}"), whole:
            seen = shown(function(self._docs[place]), self.requests[place].args[0], self.chat)
        patches = torch.zeros(self.patches, dtype=torch.bool)
        return self._text(place) | seen | {"image_id": self._image_id(place), "patches": patches}

    def sketch(self, place: int) -> tuple[dict, bytes]:
        """An item without its images, and a hash of the document with them, which are not opened for it."""
        doc = json.dumps(self._plain[place], sort_keys=True, default=lambda value: type(value).__name__)
        digest = hashlib.sha256(doc.encode())
        digest.update(self._image_id(place).encode())
        return self._text(place), digest.digest()

    def texts(self, place: int) -> dict:
        """An item without its images, as far as its document can be read."""
        known = {"id": self._id(place), "image_id": self._id(place), "question": self.requests[place].args[0]}
        for more in (self._text, lambda place: {"image_id": self._image_id(place)}):
            with suppress(DataError, OSError):
                known |= more(place)
        return known

    def judge(self, sample: dict, text: str) -> dict:
        """What the task makes of an answer: the value of each of its metrics for this document, and if it is right."""
        place, text = self.places[sample["id"]], cut(text, self.until)
        doc = self._plain[place]
        with self._judging(f"cannot judge the answer to document {place}"):
            values = self._process(place, doc, text)
        outcome = {"answer": sample["answer"], "prediction": text.strip(), "correct": self._correct(values)}
        try:
            stored = json.loads(json.dumps(values, default=lambda value: value.tolist()), parse_constant=lambda _: None)
        except (TypeError, AttributeError) as error:
            raise DataError(f"task {self.name!r}: its results cannot be kept as JSON ({error})") from error
        return outcome | {"scores": stored}

    def scores(self, outcomes: Sequence[dict], folder: Path) -> list[Score]:
        """Every metric of the task over all outcomes; what it writes (submissions) goes below `folder`."""
        outcomes = sorted((o for o in outcomes if o["id"] in self.places), key=lambda o: self.places[o["id"]])
        names = dict.fromkeys(key for outcome in outcomes for key in outcome["scores"])
        kinds = list(dict.fromkeys(name.rpartition(",")[2] for name in names))
        found = []
        for name in names:
            metric, _, kind = name.rpartition(",")
            if metric not in self.task.aggregation():
                continue
            having = [outcome for outcome in outcomes if name in outcome["scores"]]
            values = [outcome["scores"][name] for outcome in having]
            singles = [self._single(value) for value in values]
            aggregate = self.task.aggregation()[metric]
            plain = "args" not in inspect.signature(aggregate).parameters
            score = Score(
                name=f"{self.name}/{metric}" + ("" if kind == "none" else f",{kind}"),
                values=values,
                singles=None if None in singles else singles,
                clusters=[outcome["image"] for outcome in having],
                aggregate=lambda values, aggregate=aggregate: self._aggregate(aggregate, values, folder),
                sampled=plain and self._judge is None,
                main=metric in self.main and kind == kinds[0],
            )
            found.append(score)
            if self.macro and score.main:
                families = [str(self._plain[self.places[outcome["id"]]][self.family]) for outcome in having]
                found[-1:] = [replace(score, main=False), macro_average(score, families)]
        return found

    # What lmms-eval is asked ---------------------------------------------------------------------------------------

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

    def _process(self, place: int, doc: dict, text: str) -> dict:
        """Metric and filter → value, as `lmms_eval.evaluator` fills them in."""
        from lmms_eval.api.instance import Instance
        from lmms_eval.api.reasoning import strip_reasoning_tags

        request = self.requests[place]
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
        more = (
            {"args": SimpleNamespace(output_path=str(folder))}
            if "args" in inspect.signature(aggregate).parameters
            else {}
        )
        with self._judging(f"cannot aggregate {len(values)} documents"):
            found = aggregate(values, **more)
        return float(found) if isinstance(found, (int, float)) or hasattr(found, "item") else None

    def _correct(self, values: dict) -> bool | float | None:
        """What the paired statistics go by: the value of the main metric for this document, if it is between 0 and 1."""
        for name, value in values.items():
            metric = name.rpartition(",")[0]
            if metric not in self.main:
                continue
            single = self._single(value)
            if single is None and self.alone:
                with TemporaryDirectory() as folder:
                    single = self._aggregate(self.task.aggregation()[metric], [value], Path(folder))
                if single not in (0, 1, 100):
                    raise DataError(f"data.alone=true, but {metric} of one document alone is {single}, not 0, 1 or 100")
                single = min(single, 1)
            if single is None or not 0 <= single <= 1:
                return None
            return bool(single) if single in (0, 1) else float(single)
        return None

    def _single(self, value) -> float | None:
        """A document's own score: the value itself, or the field of it that the task says."""
        if isinstance(value, Mapping):
            value = value.get(self.task.config.score_key)
        is_number = isinstance(value, (int, float)) or hasattr(value, "item")
        return float(value) if is_number and math.isfinite(float(value)) else None

    def _try(self) -> None:
        """Before any model works: does the task show and judge a document (the first that can be read), and does the judge
        answer if it asks one?"""
        tried = (read(self, place) for place in range(min(TRIED, len(self))))
        sample = next((sample for sample in tried if not isinstance(sample, Failed)), None) or self[0]
        values = self.judge(sample, UNREADABLE)["scores"]
        with TemporaryDirectory() as folder:
            for name, value in values.items():
                aggregate = self.task.aggregation().get(name.rpartition(",")[0])
                if aggregate is None:
                    continue
                try:
                    self._aggregate(aggregate, [value], Path(folder))
                except JudgeError:
                    raise
                except DataError:  # one document may be too few for a metric: that is not what is asked here
                    continue

    @contextmanager
    def _judging(self, what: str) -> Iterator[None]:
        with judged_by(self._judge, self.name), self._failing(what):
            yield

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            with self.task.loading():  # some load the images of their documents only when they show them
                yield
        except Exception as error:  # anything: it is the task's own code
            raise DataError(f"task {self.name!r} {what}: {first_line(error)}") from error

    # Documents -----------------------------------------------------------------------------------------------------

    def _id(self, place: int) -> str:
        return f"{self.name}-{place:06d}"

    def _text(self, place: int) -> dict:
        doc = self._plain[place]
        if self.family is not None and self.family not in doc:
            raise UnknownName(unknown(f"column of task {self.name!r}:", self.family, map(str, doc)))
        return {
            "id": self._id(place),
            "question": self.requests[place].args[0],
            "answer": self._answer(place, doc),
            "family": str(doc[self.family]) if self.family is not None else "all",
        }

    def _answer(self, place: int, doc: dict) -> str:
        with self._failing(f"cannot say the answer of document {place}"):
            answer = str(self.task.doc_to_target(doc))
        # Some name a column that there is not: their real answers are in what they process.
        return "" if answer == self.task.config.doc_to_target else answer

    @property
    def _docs(self):
        return self.task.eval_docs

    @property
    def _plain(self):
        """The documents as results are processed: without images, unless the task wants them."""
        return self.task.eval_docs_no_media

    @cached_property
    def _raw(self):
        return self._docs.with_format("arrow")

    def _image_id(self, place: int) -> str:
        """A hash of the document's image files, which makes questions about one image one cluster; else its own id."""
        row, digest, found = self._raw[place], hashlib.sha256(), False
        for column in row.column_names:
            for cell in row.column(column).to_pylist():
                for image in cell if isinstance(cell, list) else [cell]:
                    if isinstance(image, dict) and set(image) == {"bytes", "path"}:
                        found = True
                        digest.update(
                            image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
                        )
        return digest.hexdigest()[:16] if found else self._id(place)
