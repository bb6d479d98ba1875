"""One report over several result folders: jobs of a multirun, or runs that somebody compares."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ivtp import results as store
from ivtp.registry import UserError
from ivtp.report import report
from ivtp.results import Result

PARTS = ("model", "data", "prompt")
"""Fields of a result that have to be equal for outcomes to be about the same questions to the same model."""


@dataclass(frozen=True)
class Source:
    """Folder with the results of a run, and what tells it from the others, as {key: value}; "": a value that needs no key."""

    folder: Path
    differs: dict[str, str]
    results: list[Result]
    about: dict


def sources(folders: Iterable[tuple[Path, dict[str, str]]]) -> list[Source]:
    """Finished results of folders; raises UserError for a folder without any."""
    return [Source(folder, differs, *store.finished(folder)) for folder, differs in folders]


def alike(some: Sequence[Source]) -> list[list[Source]]:
    """Group sources by model, data and prompt."""
    groups: dict[bytes, list[Source]] = {}
    for source in some:
        groups.setdefault(store.as_json(_identity(source)), []).append(source)
    return list(groups.values())


def _identity(source: Source) -> list:
    return [getattr(source.results[0], part) for part in PARTS]


def check_alike(some: Sequence[Source]) -> None:
    """Refuse sources that are not about the same model, data and prompt; the message names what differs."""
    first = some[0]
    for other in some[1:]:
        for part, a, b in zip(PARTS, _identity(first), _identity(other), strict=True):
            if a == b:
                continue
            a, b = (value if isinstance(value, dict) else {part: value} for value in (a, b))
            different = [f"{k}={b.get(k)}, not {a.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k)]
            raise UserError(
                f"{other.folder} has another {part} than {first.folder} ({'; '.join(different)}); results are compared on the "
                "same questions to the same model, so give folders that agree in them"
            )


def labelled(some: Sequence[Source]) -> list[tuple[Source, Result]]:
    """Rows of all sources under labels of their own.

    A row that several sources have is taken once. Rows of one label with different results are told apart by the keys in
    which their sources differ.
    """
    rows: dict[str, tuple[Source, Result]] = {}
    for source in some:
        for result in source.results:
            rows.setdefault(result.key, (source, result))
    named: dict[str, list[tuple[Source, Result]]] = {}
    for source, result in rows.values():
        named.setdefault(result.label, []).append((source, result))
    several = {r.seeds_of or r.label for same in named.values() if len(same) > 1 for _, r in same}
    told: dict[str, list[dict]] = {}
    for source, result in rows.values():
        told.setdefault(result.seeds_of or result.label, []).append(source.differs)
    renamed = []
    for source, result in rows.values():
        base = result.seeds_of or result.label
        if base in several:
            keys = [k for k in source.differs if len({d.get(k) for d in told[base]}) > 1]
            suffix = ", ".join(f"{k}={source.differs[k]}" if k else source.differs[k] for k in keys)
            suffix = suffix or result.key[:8]
            seeds_of = result.seeds_of and f"{result.seeds_of}, {suffix}"
            label = result.label.replace(base, f"{base}, {suffix}", 1)
            result = replace(result, label=label, seeds_of=seeds_of, series=result.series or base)
        renamed.append((source, result))
    return renamed


def merge(some: Sequence[Source], folder: Path, console, compare_to: str | None = None) -> None:
    """Write the rows of all sources, which are alike, with their outcomes and one report into a folder.

    compare_to  label of the row that all others are tested against; default: that of the sources, or the first pruned row
    """
    title = " + ".join(dict.fromkeys(source.results[0].experiment for source in some))
    rows = [(source, replace(result, experiment=title)) for source, result in labelled(some)]
    results = [result for _, result in rows]
    labels = {result.seeds_of or result.label for result in results}
    pruned = [result.seeds_of or result.label for result in results if result.pruner["name"] != "none"]
    given = [compare_to, *(source.about.get("compare_to") for source in some)]
    abouts = [source.about for source in some]
    blind = next((source for source in some if source.about.get("blind")), None)
    about = {
        "keys": [result.key for result in results],
        "blind": blind and blind.about["blind"],
        "compare_to": next((label for label in given if label in labels), pruned[0] if len(pruned) > 1 else None),
        "question": abouts[0].get("question", "") if len({about.get("question") for about in abouts}) == 1 else "",
        "paper": list(dict.fromkeys(name for about in abouts for name in about.get("paper") or [])),
        "claims": _claims(abouts, labels),
        "overlap": next((about["overlap"] for about in abouts if about.get("overlap") is not None), None),
    }
    outcomes = {result.key: store.outcomes_of(source.folder, result) for source, result in rows}
    with store.only_writer(folder):
        for key, lines_of in outcomes.items():
            store.replace(folder / "outcomes" / f"{key}.jsonl", store.lines(store.with_schema(lines_of)))
        store.replace(folder / "results.jsonl", store.lines(result.line() for result in results))
        if blind:
            store.replace(folder / "blind.jsonl", (blind.folder / "blind.jsonl").read_bytes())
        _merge_viewers(some, folder)
        store.replace(folder / "experiment.json", store.as_json(about))
        report(folder, results, console, about)


def _claims(abouts: Iterable[dict], labels: set[str]) -> list[dict]:
    """Claims about rows that are still there under their labels, each once."""
    claims = [claim for about in abouts for claim in about.get("claims") or [] if labels.issuperset(claim["rows"])]
    return list({claim["claim"]: claim for claim in claims}.values())


def _merge_viewers(some: Sequence[Source], folder: Path) -> None:
    """Copy the pictures of the viewer, and the samples that they belong to, each once."""
    samples = {}
    for source in some:
        viewer = source.folder / "viewer"
        for sample in store.read(viewer / "samples.jsonl")[0]:
            samples.setdefault(sample["id"], sample)
            picture = viewer / Path(sample["picture"]).name
            if picture.is_file() and not (folder / "viewer" / picture.name).exists():
                store.replace(folder / "viewer" / picture.name, picture.read_bytes())
    if samples:
        store.replace(folder / "viewer" / "samples.jsonl", store.lines(samples.values()))
