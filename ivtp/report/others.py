"""Tables below the main one, for experiments that have them."""

from collections.abc import Iterator
from pathlib import Path

from ivtp import results as store
from ivtp.data.outcomes import Outcome
from ivtp.evaluation.profiling import PARTS
from ivtp.report import costs, paper
from ivtp.report.tables import Column, Table, families_of, levels_of, make_table, metric, percent, ratio
from ivtp.results import Result


def failed_samples(failed: dict[str, list[Outcome]], most: int = 50) -> Iterator[Table]:
    """Table of samples without a result and the reasons, a line for all rows with the same one."""
    rows: dict[tuple, list[str]] = {}
    for label, outcomes in failed.items():
        for outcome in outcomes:
            rows.setdefault((outcome["id"], outcome["cause"], outcome["failed"]), []).append(label)
    if not rows:
        return
    columns = [
        Column("sample", lambda row: row[0]),
        Column("cause", lambda row: row[1]),
        Column("reason", lambda row: row[2]),
        Column("rows", lambda row: "all" if len(rows[row]) == len(failed) else ", ".join(rows[row])),
    ]
    note = "They are left out of every number, and of both rows of a comparison. The next start tries them again."
    if len(rows) > most:
        note += f" Shown: {most} of {len(rows)}; all of them are in outcomes/."
    yield make_table("Failed samples", columns, list(rows)[:most], note)


def blind_accuracy(results: list[Result], blind: Result | None, prior: dict[str, float]) -> Iterator[Table]:
    """Blind accuracy and answer prior beside the first row, if blind accuracy was measured."""
    if blind is None:
        return
    families = families_of(results)
    names = ["accuracy", *(f"accuracy/{family}" for family in families if len(families) > 1)]
    rows = [
        (results[0].label, results[0].metrics),
        ("without images", blind.metrics),
        ("commonest answer", {name: {"mean": value, "se": None, "n": 1} for name, value in prior.items()}),
    ]
    columns = [Column("row", lambda row: row[0])]
    columns += [
        Column(name.removeprefix("accuracy/"), lambda row, name=name: row[1].get(name), percent) for name in names
    ]
    note = "without images: the unpruned model reads the questions alone; commonest answer: always that of the family."
    yield make_table("Blind accuracy and answer prior", columns, rows, note)


def by_difficulty(results: list[Result]) -> Iterator[Table]:
    """Accuracy per level of difficulty, if the data set states it."""
    if levels := levels_of(results):
        columns = [metric(level, f"difficulty/{level}") for level in levels]
        note = "Of the questions that have such a target, in %."
        yield make_table("Accuracy by difficulty", [Column("row", lambda r: r.label), *columns], results, note)


def passing_words(results: list[Result]) -> Iterator[Table]:
    """Words that pass τ, for rows that read the instruction by it."""
    columns = [
        Column("row", lambda r: r.label),
        Column("words", lambda r: ", ".join(f"{word} {100 * share:.0f}" for word, share in r.words["top"])),
    ]
    if rows := [result for result in results if result.words]:
        yield make_table(
            "Words that pass most often, and in how many of the questions that have them (%)", columns, rows
        )


def cost_by_part(results: list[Result]) -> Iterator[Table]:
    """Per part: FLOPs in closed form for one sample, as torch counted them on it, and milliseconds per question."""

    def part(name: str) -> Column:
        def cell(result) -> str:
            seconds = result.speed["parts"]
            seconds = seconds | {"total": sum(seconds.values())}
            closed, counted = result.counted["closed"][name], result.counted["counted"][name]
            return f"{closed / 1e6:.4g} / {counted / 1e6:.4g}, {1e3 * seconds.get(name, 0.0):.2f}"

        return Column(f"{name}: closed / counted MFLOPs, ms", cell)

    if rows := [result for result in results if result.counted]:
        columns = [Column("row", lambda r: r.label), *map(part, (*PARTS, "total"))]
        note = "Scores are counted as they run here, without forming a map; the table above takes maps as given."
        yield make_table("Cost by part", columns, rows, note)


def costs_of_models(folder: Path) -> Iterator[Table]:
    """Closed-form cost of the same rows on other models."""
    for table in costs.tables(store.read(folder / "costs.jsonl")[0]):
        yield table._replace(title=f"Closed form: {table.title}")


def of_the_paper(name: str) -> Table:
    """Table of the paper; methods with trained modules of their own are marked with ‡."""
    columns = [
        Column("row", lambda row: row["label"]),
        Column("TFLOPs", lambda row: f"{row['tflops']:g}"),
        Column("of unpruned", lambda row: row["share"], ratio),
        *(
            Column(head, lambda row, i=i: row["scores"][i] if "scores" in row else None, "{:.1f}".format)
            for i, head in enumerate(paper.table(name).get("columns", []))
        ),
        Column("average", lambda row: row.get("average"), "{:.1f}".format),
        Column("drop", lambda row: row["drop"], "{:+.1f}".format),
    ]
    rows = [paper.row(f"{name}/{label}") for label in paper.table(name)["rows"]]
    return make_table(paper.title(name), columns, rows, paper.NOTE)
