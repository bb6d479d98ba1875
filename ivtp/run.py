"""`python -m ivtp.run experiment=ablation_groupsize`: compose → rows → evaluate → record → report.

Any key of the config can be given as `key=value`, any group as `group=name`; `--help` lists them.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean

from ivtp.command import command
from ivtp.registry import UserError

VERSIONED = ("torch", "transformers", "lightning", "timm", "open_clip_torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 0: done, 2: the request cannot be met (one line on standard error)."""
    os.environ.setdefault("WANDB_SILENT", "true")
    return command(arguments, usage, run)


def usage() -> str:
    from ivtp.config import GROUPS, options

    lines = [__doc__.strip(), ""]
    for group in GROUPS:
        lines.append(f"{group}=")
        lines += [f"  {name:20} {about}" for name, about in options(group).items()]
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> Path:
    """Evaluate every row that has no result yet, then report on all; returns the folder of the results."""
    from ivtp.config import load_config, variants

    config = load_config(arguments)
    rows = list(variants(config))
    folder = Path(config.output) / config.name
    records_probe(folder)

    from omegaconf import OmegaConf

    from ivtp.console import PlainConsole

    console = PlainConsole()  # standard error is for what went wrong
    console.print(f"{config.name}: {len(rows)} rows → {folder}", soft_wrap=True)

    from ivtp import build, records

    build.quiet_libraries()
    from ivtp.report import check_paper

    check_paper(config.paper, rows)
    check_claims(config, rows)
    spend(config, rows, folder, console)
    if not config.evaluate:
        return folder
    rows = [row for row in rows if not row["stand_in"]]
    device = pick_device(config)
    model, processor = build.build_model(config, device)
    shape = build.shape_of(model, build.usual_image(config))
    reference = "class token" if shape.has_cls else "mean of all patches"
    if not shape.has_cls:
        console.print(f"{config.model.source} has no class token: in its tower the {reference} judges", soft_wrap=True)
    data = build.build_data(config, processor, shape, config.trainer.batch_size, build.context_of(model))
    say_crops(model, data.survey.sizes, console)
    if data.survey.failed:
        console.print(f"{len(data.survey.failed)} of {len(data.data)} samples cannot be used", soft_wrap=True)
    text = mean_prompt(data.survey, processor) if shape.language else 0
    planned = build.plan_rows(rows, shape, text, 2)
    identity = {
        "model": build.model_identity(config, model, processor),
        "data": OmegaConf.to_container(config.data) | data.about | {"hash": data.survey.hash},
        "prompt": build.prompt_of(config),
        "code": records.code_version(),
    }
    text_encoder = build.text_identity(model, planned)
    if any(map(build.reads_text, planned)):  # its own tokens are known now
        planned = build.plan_rows(rows, shape, text, mean_instruction(data.survey, model))
    if config.blind and build.is_encoder(config):
        raise UserError("blind=true asks questions without their images, but an encoder is asked none; leave it out")
    results = folder / "results.jsonl"
    finished, torn = records.read(results)
    if torn:
        console.print(f"{torn} torn line(s) of {results} set aside in {results.name}.torn", soft_wrap=True)
    done = {record["key"]: record for record in finished}
    about = {"experiment": config.name, **identity, "text_tokens": text, "reference": reference, "seed": config.seed}
    about |= machine(device)

    from ivtp.report import report, viewer

    watch = viewer.save(folder, data.data, processor, config.viewer if viewer.drawable(shape) else 0)
    from ivtp.evaluator import Evaluator

    evaluator = Evaluator(model, processor, data, config, folder, console, watch)
    current = []
    for number, row in enumerate(planned, start=1):
        asked = {k: v for k, v in asdict(row).items() if k in ("pruner", "budget", "position_ids")}
        sources = {
            "text_encoder": text_encoder if build.reads_text(row) else None,
            "pruner_source": build.pruner_source(row.pruner["name"]),
        }
        key = records.key(asked, identity, sources)
        record = done.get(key)
        evaluator.share(planned[number - 1 :])
        # Samples that failed are tried again: a file may have been mended, the device free of other work.
        if record is None or record["label"] != row.label or record.get("failed"):
            title, before = f"{number}/{len(planned)} {row.label}", record
            record = evaluator.evaluate(key, row, title) | about | sources
            record["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            if before is not None and before["label"] == row.label:
                record["speed"] = before["speed"]  # of all samples, not of those that were tried again
            if before is None or outcome_of(before) != outcome_of(record):
                records.append(results, [record])
                evaluator.unlogged(key)
        current.append(record)
        evaluator.log(record, current)
    blind = blind_accuracy(config, evaluator, identity, shape, about) if config.blind else None
    experiment = {
        "keys": [record["key"] for record in current],
        "blind": blind and blind["key"],
        "compare_to": config.compare_to,
        "question": question(config),
    }
    experiment |= {key: OmegaConf.to_container(config)[key] for key in ("paper", "claims", "pictures", "overlap")}
    records.replace(folder / "experiment.json", records.as_json(experiment))
    images = processor.image_processor
    report(folder, current, config.compare_to, data.data, console, experiment["question"], experiment, images)
    return folder


def blind_accuracy(config, evaluator, identity: dict, shape, about: dict) -> dict:
    """Record of the unpruned model on the questions without their images, kept in blind.jsonl."""
    from omegaconf import OmegaConf

    from ivtp import build, records
    from ivtp.config import variants
    from ivtp.evaluator import Evaluator

    path = evaluator.folder / "blind.jsonl"
    key = records.key("without images", identity)
    found = {record["key"]: record for record in records.read(path)[0]}.get(key)
    if found is None or found.get("failed"):
        data = evaluator.data.without_images()
        blind = Evaluator(evaluator.model, evaluator.processor, data, config, evaluator.folder, evaluator.console)
        unpruned = OmegaConf.merge(config, {"variants": [{"label": "unpruned", "pruner": "none"}]})
        (row,) = build.plan_rows(list(variants(unpruned)), shape, 0, 0)
        found = blind.blind(key, row) | about
        records.append(path, [found])
    return found


def say_crops(model, sizes: list, console) -> None:
    """Print how many images a limit of crops concerns, where it is set; for data whose images are opened later only the
    records can say it."""
    from ivtp.backbones.companions import crop_limit_of

    limit, known = crop_limit_of(model), [images for images in sizes if images is not None]
    if limit is None:
        return
    rule = f"max_crops={limit.crops}: images that the checkpoint cuts into more crops are made smaller"
    counted = f"{sum(map(limit.affected, known))} of the {sum(map(len, known))} images of all questions"
    console.print(f"{rule}; {counted if known else 'how many is recorded with the results'}", soft_wrap=True)


def outcome_of(record: dict) -> bytes:
    """Result of a row as bytes, to tell whether trying again changed it."""
    from ivtp import records

    return records.as_json([record["label"], record["metrics"], record.get("failed")])


def check_claims(config, rows: list[dict]) -> None:
    """Every row that is compared to, or claimed something of, exists; rows of several seeds go by their common label.
    So does the section whose overlap is asked for."""
    from ivtp.registry import UnknownName, unknown

    labels = {row["seeds_of"] or row["label"] for row in rows}
    named = [config.compare_to] if config.compare_to is not None else []
    for name in [*named, *(row for claim in config.claims for row in claim["rows"])]:
        if name not in labels:
            raise UnknownName(unknown("row to compare to", str(name), labels))
    sections = {row["section"] for row in rows}
    if config.overlap is not None and config.overlap not in sections:
        raise UnknownName(unknown("section to show the overlap of:", str(config.overlap), sections))


def spend(config, rows: list[dict], folder: Path, console) -> None:
    """The cost of the rows on the models of `costs`, from their configs alone: printed, and in costs.jsonl."""
    from omegaconf import OmegaConf

    from ivtp import records
    from ivtp.build import build_shape
    from ivtp.config import FOLDER, options
    from ivtp.cost import as_text, closed_form, tables
    from ivtp.registry import UnknownName, unknown

    found = []
    for name in (config.costs.models or []) if config.variants else []:
        if name not in options("model"):
            raise UnknownName(unknown("model", str(name), options("model")))
        shape = build_shape(OmegaConf.create({"model": OmegaConf.load(FOLDER / "model" / f"{name}.yaml")}))
        try:
            found += closed_form(name, rows, shape, config.costs.text, None)
        except UserError as error:  # a budget that only fits the model that runs
            console.print(f"no cost of {name}: {error}", soft_wrap=True)
    records.replace(folder / "costs.jsonl", b"")
    records.append(folder / "costs.jsonl", found)
    if not config.evaluate:
        from ivtp.report.tables import markdown

        made = tables(found)
        for table in made:
            print(as_text(table))
        text = f"# {config.name}\n" + "".join(markdown(*table) for table in made)
        records.replace(folder / "table.md", text.encode(errors="backslashreplace"))


def question(config) -> str:
    """What the experiment asks: its own `question`, else the first comment of its YAML."""
    from ivtp.config import options

    return config.get("question") or options("experiment").get(config.name, "")


def records_probe(folder: Path) -> None:
    """Fail before any work if nothing can be written where the results go."""
    from ivtp import records

    records.replace(folder / ".probe", b"")
    (folder / ".probe").unlink()


def pick_device(config) -> str:
    import torch

    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    device = config.trainer.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"trainer.device={device}, but torch sees no CUDA device here; use trainer.device=cpu")
    return device


def mean_prompt(survey, processor) -> int:
    """Mean tokens of a prompt without its image."""
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    prompts = usable(survey.prompts, survey)
    return round(mean(len(ids) - ids.count(image) for ids in processor.tokenizer(prompts)["input_ids"]))


def mean_instruction(survey, model) -> int:
    """Mean tokens that the model's text encoder reads of a question."""
    from ivtp.backbones.companions import guide_for

    return round(mean(guide_for(model).encoder.lengths(usable(survey.questions, survey))))


def usable(texts: list[str], survey) -> list[str]:
    """Texts of the samples that can be used."""
    return [text for place, text in enumerate(texts) if place not in survey.failed]


def machine(device: str) -> dict:
    """Where and with what the results were made."""
    import torch

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
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "versions": {"ivtp": version("ivtp"), "python": platform.python_version()}
        | {package: version(package) for package in VERSIONED},
        "git": git or None,
        "machine": {"device": device, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


if __name__ == "__main__":
    raise SystemExit(main())
