"""Steps of a run after its request was checked: load, plan, evaluate, record, report."""

import platform
import subprocess
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from ivtp import __version__
from ivtp import results as store
from ivtp.backbones.text.pairing import crop_limit_of, guide_for
from ivtp.core.flops import Shape
from ivtp.data.datamodule import QuestionData
from ivtp.evaluation.hardware import attention_kernel, hardware
from ivtp.experiment import planning as build
from ivtp.experiment import ranks
from ivtp.experiment.planning import Planned, plan_rows
from ivtp.experiment.runner import Evaluator
from ivtp.experiment.variants import variants
from ivtp.registry import UserError
from ivtp.report import loggers, report, viewer
from ivtp.results import Result

BLIND = "without images"
"""Label of the result in blind.jsonl."""
VERSIONED = ("torch", "transformers", "lightning", "timm", "open_clip_torch")


def evaluate(config: DictConfig, rows: list[dict], folder: Path, console: Console) -> list[Result]:
    """Evaluate and record the rows, write the report, and return the results."""
    setup = load(config, console)
    planned = plan(setup, rows)
    ranks.agree([row.key for row in planned])
    images = config.viewer if viewer.drawable(setup.shape) else 0
    watch = ranks.shared(lambda: viewer.save(folder, setup.data.data, setup.processor, images))
    evaluator = Evaluator(setup.model, setup.processor, setup.data, config, folder, console, watch)
    try:
        results = evaluate_rows(planned, evaluator)
    finally:
        evaluator.close()
    blind = blind_accuracy(setup, evaluator) if config.blind else None
    if not ranks.first():
        return []
    settings: Any = OmegaConf.to_container(config)
    experiment = {
        "keys": [result.key for result in results],
        "blind": blind and blind.key,
        "compare_to": config.compare_to,
        "question": config.question or "",
    }
    experiment |= {key: settings[key] for key in ("paper", "claims", "kept_tokens", "overlap")}
    store.replace(folder / "experiment.json", store.as_json(experiment))
    report(folder, results, console, experiment, setup.data.data, setup.processor.image_processor)
    return results


@dataclass(frozen=True)
class Setup:
    """Model and data of a run.

    identity       model, data, prompt and code, of which the key of every result is made
    circumstances  fields that all results of the run share
    """

    config: DictConfig
    model: nn.Module
    processor: Any
    shape: Shape
    data: QuestionData
    identity: dict
    circumstances: dict


def load(config: DictConfig, console: Console) -> Setup:
    """Load model and data, and print notes on them."""
    if config.blind and build.is_encoder(config):
        raise UserError("blind=true asks questions without their images, but an encoder is asked none; leave it out")
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    device = ranks.device_of(config.trainer, config.model.get("device_map"))
    model, processor = build.build_model(config, device)
    shape = build.shape_of(model, build.usual_image(config))
    reference = "class token" if shape.has_cls else "mean of all patches"
    if not shape.has_cls:
        console.print(
            f"{config.model.source} has no class token: the {reference} is the reference token of its tower",
            soft_wrap=True,
        )
    data = build.build_data(config, processor, shape, config.trainer.batch_size, build.context_of(model))
    say_crops(model, data.survey.sizes, console)
    if data.survey.failed:
        console.print(f"{len(data.survey.failed)} of {len(data.data)} samples cannot be used", soft_wrap=True)
    about: Any = OmegaConf.to_container(config.data)
    identity = {
        "model": build.model_identity(config, model, processor),
        "data": about | data.about | {"hash": data.survey.hash},
        "prompt": build.prompt_of(config),
        "code": store.code_version(),
    }
    circumstances = {"experiment": config.name, **identity, "reference": reference, "seed": config.seed}
    return Setup(
        config, model, processor, shape, data, identity, circumstances | machine(device, attention_kernel(model))
    )


def plan(setup: Setup, rows: list[dict]) -> list[Planned]:
    """Plan the rows, and fill in the key of each result and the fields of which it is made."""
    text = mean_prompt(setup.data.survey, setup.processor) if setup.shape.language else 0
    unkeyed = plan_rows(rows, setup.shape, text, 2)
    text_encoder = build.text_identity(setup.model, unkeyed)
    if any(row.plan.reads_text for row in unkeyed):  # its tokenizer is there now
        unkeyed = plan_rows(rows, setup.shape, text, mean_instruction(setup.data.survey, setup.model))
    planned = []
    for row in unkeyed:
        budget = row.budget if "keep" in row.pruner else {}  # the unpruned model is the same under any budget
        request = {"pruner": row.pruner, "budget": budget, "position_ids": row.position_ids}
        sources = {
            "text_encoder": text_encoder if row.plan.reads_text else None,
            "pruner_source": build.pruner_source(row.pruner["name"]),
        }
        key = store.key(request, setup.identity, sources)
        planned.append(replace(row, key=key, text_tokens=text, **sources, **setup.circumstances))
    return planned


def evaluate_rows(planned: list[Planned], evaluator: Evaluator) -> list[Result]:
    """Results of all rows: those on disk, and new ones, which are recorded and logged one by one.

    Every rank evaluates, and rank 0 has the results.
    """
    path = evaluator.folder / "results.jsonl"
    before = recorded(path, evaluator.console)
    finished = ranks.shared(lambda: [is_finished(before.get((row.key, row.label)), evaluator) for row in planned])
    results: list[Result] = []
    for number, row in enumerate(planned):
        evaluator.share(planned[number:])
        result = old = before.get((row.key, row.label))
        if not finished[number]:  # samples that failed are tried again: a file may have been mended
            result = evaluator.evaluate(row, f"{number + 1}/{len(planned)} {row.label}")
        if result is None:
            continue
        if not finished[number]:
            # The rate is that of all samples, not of those that were tried again.
            result = replace(result, time=now(), speed=old.speed if old else result.speed)
            if old is None or outcome_of(old) != outcome_of(result):
                store.append_results(path, [result])
                loggers.unlogged(evaluator.folder, result)
        results.append(result)
        evaluator.log(result, results[0], last=number + 1 == len(planned))
    if all(finished):
        text = f"all {len(planned)} rows have results already; none was evaluated again"
        evaluator.console.print(text, soft_wrap=True)
    return results


def recorded(path: Path, console: Console) -> dict[tuple[str, str], Result]:
    """Last result on disk of every key and label, for rank 0; what cannot be used, or is there twice, is set aside."""
    if not ranks.first():
        return {}
    results, torn = store.read_results(path)
    if torn:
        console.print(f"{torn} torn line(s) of {path} set aside in {path.name}.torn", soft_wrap=True)
    if doubled := store.drop_repeated(path):
        console.print(f"{doubled} doubled line(s) of {path} set aside in {path.name}.aside", soft_wrap=True)
    return {(result.key, result.label): result for result in results}


def is_finished(result: Result | None, evaluator: Evaluator) -> bool:
    """True if a row needs no evaluation: its result is on disk, and with it exactly the outcomes that it was made of."""
    return result is not None and not result.failed and evaluator.supports(result)


def blind_accuracy(setup: Setup, evaluator: Evaluator) -> Result | None:
    """Result of the unpruned model on the questions without their images, kept in blind.jsonl."""
    path = evaluator.folder / "blind.jsonl"
    key = store.key("without images", setup.identity)
    result = recorded(path, evaluator.console).get((key, BLIND))
    if ranks.shared(lambda: is_finished(result, evaluator)):
        return result
    data = evaluator.data.without_images()
    blind = Evaluator(setup.model, setup.processor, data, setup.config, evaluator.folder, evaluator.console)
    unpruned: Any = OmegaConf.merge(setup.config, {"variants": [{"label": BLIND, "pruner": "none"}]})
    (row,) = plan_rows(list(variants(unpruned)), setup.shape, 0, 0)
    result = blind.blind(replace(row, key=key))
    if result is not None:
        result = replace(result, time=now(), **setup.circumstances)
        store.append_results(path, [result])
    return result


def now() -> str:
    """Local time with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def say_crops(model, sizes: list, console) -> None:
    """Print how many images a limit of crops concerns, if one is set and their sizes are known already."""
    limit, known = crop_limit_of(model), [images for images in sizes if images is not None]
    if limit is None:
        return
    rule = f"max_crops={limit.crops}: images that the checkpoint cuts into more crops are made smaller"
    counted = f"{sum(map(limit.affected, known))} of the {sum(map(len, known))} images of all questions"
    console.print(f"{rule}; {counted if known else 'how many is recorded with the results'}", soft_wrap=True)


def outcome_of(result: Result) -> bytes:
    """Content of a result as bytes, to see if another try changed it."""
    return store.as_json([result.label, result.metrics, result.failed])


def mean_prompt(survey, processor) -> int:
    """Mean tokens of a prompt without its image."""
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    ids = processor.tokenizer(usable(survey.prompts, survey))["input_ids"]
    return round(mean(len(row) - row.count(image) for row in ids))


def mean_instruction(survey, model) -> int:
    """Mean tokens of a question in the model's text encoder."""
    return round(mean(guide_for(model).encoder.lengths(usable(survey.questions, survey))))


def usable(texts: list[str], survey) -> list[str]:
    """Texts of the samples that can be used."""
    return [text for index, text in enumerate(texts) if index not in survey.failed]


def machine(device: str, kernel: str | None = None) -> dict:
    """Versions, commit and machine of the run; `kernel`: attention implementation of its model."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:  # no git here
        git = ""
    return {
        "versions": {"ivtp": __version__, "python": platform.python_version()}
        | {package: version(package) for package in VERSIONED},
        "git": git or None,
        "machine": {"device": device} | hardware(device, kernel) | {"ranks": ranks.world()},
    }
