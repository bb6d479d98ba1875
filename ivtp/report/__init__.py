"""What people look at: the table, the figures, the W&B runs. Everything is drawn from the records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ivtp import records
from ivtp.data.failures import answered, failures
from ivtp.evaluation.statistics import commonest, compare
from ivtp.report import claims, overlap, paper
from ivtp.report.claims import judge, together
from ivtp.report.figures import accuracy_cost, kept_tokens
from ivtp.report.page import write_page
from ivtp.report.tables import as_markdown, families_of, levels_of, markdown, percent, print_other, print_table


def report(
    folder: Path,
    rows: list[dict],
    compare_to: str | None,
    data,
    console,
    question: str = "",
    about: dict | None = None,
    image_processor=None,
) -> None:
    """Table on the console and in table.md, accuracy_flops.png, kept_tokens.png, report.html in `folder`, and overlap.png
    where the experiment asks for it.

    Beside them comparisons.json (every paired comparison, with the ids of flipped answers) and claims.json.

    data   the data set, for kept_tokens.png; None: that picture is left as it is
    about  of the experiment: the paper's tables shown beside ours, claims, what the pictures show, overlap
    image_processor  the model's, with `data`: kept_tokens.png shows images as the model reads them
    """
    about = about or {}
    recorded = {row["label"]: records.read(folder / "outcomes" / f"{row['key']}.jsonl")[0] for row in rows}
    failed = {label: failures(found) for label, found in recorded.items()}
    rows, outcomes = together(rows, {label: answered(found) for label, found in recorded.items()})
    against = [rows[0]["label"]] + ([compare_to] if compare_to and compare_to != rows[0]["label"] else [])
    comparisons = {
        row["label"]: {other: compare(outcomes[row["label"]], outcomes[other]) for other in against} for row in rows
    }
    print_table(rows, comparisons, console)
    records.replace(folder / "comparisons.json", records.as_json(comparisons, indent=1))
    judged = judge(about.get("claims") or [], outcomes, rows[0]["experiment"])
    records.replace(folder / "claims.json", records.as_json(judged, indent=1))
    agreement = list(overlap.overlaps(rows, outcomes, about["overlap"])) if about.get("overlap") is not None else []
    blind = {record["key"]: record for record in records.read(folder / "blind.jsonl")[0]}.get(about.get("blind"))
    others = [
        *failed_samples(failed),
        *blind_table(rows, blind, commonest(outcomes[rows[0]["label"]])),
        *by_difficulty(rows),
        *other_tables(folder, rows, judged, about),
        *map(overlap.table, agreement),
    ]
    for other in others:
        print_other(*other[:3], console, *other[3:])
    text = as_markdown(rows, comparisons) + "".join(markdown(*other) for other in others)
    records.replace(folder / "table.md", text.encode(errors="backslashreplace"))
    pictures = [folder / "accuracy_flops.png", folder / "kept_tokens.png"]
    accuracy_cost(rows, pictures[0])
    if data is None or not kept_tokens(
        rows, outcomes, data, image_processor, pictures[1], about.get("pictures") == "questions"
    ):
        pictures.pop()
    if overlap.heat_map(agreement, folder / "overlap.png"):
        pictures.append(folder / "overlap.png")
    pictures.append(write_page(folder, rows, outcomes, comparisons, question, compare_to, others, failed))
    written = ", ".join(str(path) for path in [folder / "table.md", *pictures])
    console.print(f"Written: {written}", soft_wrap=True, highlight=False)


def check_paper(names: list[str], rows: list[dict]) -> None:
    """Refuse tables and rows of the paper that there are none of."""
    for name in names:
        paper.table(name)
    for row in rows:
        if row.get("paper"):
            paper.row(row["paper"])


def failed_samples(failed: dict[str, list[dict]], most: int = 50) -> Iterator[tuple]:
    """The table of samples without a result, of which there may be none: each with its reason, once for all rows of it."""
    rows: dict[tuple, list[str]] = {}
    for label, found in failed.items():
        for outcome in found:
            rows.setdefault((outcome["id"], outcome["cause"], outcome["failed"]), []).append(label)
    if not rows:
        return
    lines = [
        [name, cause, reason, "all" if len(labels) == len(failed) else ", ".join(labels)]
        for (name, cause, reason), labels in rows.items()
    ]
    more = f" Shown: {most} of {len(lines)}; all of them are in outcomes/." if len(lines) > most else ""
    yield (
        "Failed samples",
        ["sample", "", "reason", "rows"],
        lines[:most],
        f"They are left out of every number, and of both rows of a comparison. The next start tries them again.{more}",
    )


def blind_table(rows: list[dict], blind: dict | None, prior: dict[str, float]) -> Iterator[tuple]:
    """The table of blind accuracy and answer prior beside the first row; nothing where `blind` was not measured."""
    if blind is None:
        return
    names = [f"accuracy/{family}" for family in families_of(rows)]
    names = ["accuracy", *(names if len(names) > 1 else [])]
    lines = [
        [label, *(percent(metrics.get(name)) for name in names)]
        for label, metrics in ((rows[0]["label"], rows[0]["metrics"]), ("without images", blind["metrics"]))
    ]
    lines.append(["commonest answer", *(f"{100 * prior[name]:.1f}" if name in prior else "–" for name in names)])
    heads = ["", *(name.removeprefix("accuracy/") for name in names)]
    note = "without images: the unpruned model reads the questions alone; commonest answer: always that of the family."
    yield "Blind accuracy and answer prior", heads, lines, note


def by_difficulty(rows: list[dict]) -> Iterator[tuple]:
    """The table of accuracies per level of difficulty, where the data set states it."""
    levels = levels_of(rows)
    if levels:
        lines = [
            [row["label"], *(percent(row["metrics"].get(f"difficulty/{level}")) for level in levels)] for row in rows
        ]
        yield "Accuracy by difficulty", ["", *levels], lines, "Of the questions that have such a target, in %."


def other_tables(folder: Path, rows: list[dict], judged: list[dict], about: dict) -> Iterator[tuple]:
    """(title, heads, lines, note) of what stands below the main table, as far as this experiment has it."""
    if judged:
        yield (
            "What the paper claims",
            claims.HEADS,
            claims.lines(judged),
            "Differences in points, 95 % bootstrap interval.",
        )
    if any(row.get("words") for row in rows):
        lines = [
            [r["label"], ", ".join(f"{w} {100 * s:.0f}" for w, s in r["words"]["top"])] for r in rows if r.get("words")
        ]
        yield "Words that pass, and in how many of the questions that have them (%)", ["", "words"], lines
    if any(row.get("counted") for row in rows):
        yield "Where the cost goes", *parts(rows)
    costs, _ = records.read(folder / "costs.jsonl")
    if costs:
        from ivtp.cost import tables

        for title, heads, lines in tables(costs):
            yield f"Closed form: {title}", heads, lines
    for name in about.get("paper") or []:
        yield paper.title(name), *paper.lines(name), paper.NOTE


def parts(rows: list[dict]) -> tuple[list[str], list[list[str]], str]:
    """Per part: FLOPs in closed form for one sample, as torch counted them on it, and measured milliseconds a question."""
    names = ("vision", "projector", "text_encoder", "language", "pruner", "total")
    heads = ["", *(f"{name}: closed / counted MFLOPs, ms" for name in names)]
    lines = []
    for row in (row for row in rows if row.get("counted")):
        seconds = row["speed"]["parts"]
        seconds = seconds | {"total": sum(seconds.values())}
        line = [row["label"]]
        for name in names:
            closed, counted = row["counted"]["closed"][name], row["counted"]["counted"][name]
            line.append(f"{closed / 1e6:.4g} / {counted / 1e6:.4g}, {1e3 * seconds.get(name, 0.0):.2f}")
        lines.append(line)
    return (
        heads,
        lines,
        "Scores are counted as they run here, without forming a map; the table above takes maps as given.",
    )
