"""Tables as lists of columns; the main table of an experiment: accuracy with errors, cost, paired comparisons."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ivtp.evaluation.task_metrics import number, own, principal
from ivtp.pruners.budget import in_words
from ivtp.report import paper
from ivtp.results import Result
from ivtp.text import one_line

UNKNOWN = "–"


class Column(NamedTuple):
    """Column of a table: its heading, the value of a row, and the text of a value.

    A value of None is shown as "–", a text as it is. note explains the column below the table; brief is the text in a
    terminal, if it differs.
    """

    heading: str
    value: Callable[[Any], Any]
    format: Callable[[Any], str] = str
    note: str = ""
    brief: Callable[[Any], str] | None = None

    def cell(self, row: Any, brief: bool = False) -> str:
        """Text of this column for one row."""
        value = self.value(row)
        if value is None or isinstance(value, str):
            return UNKNOWN if value is None else value
        return ((brief and self.brief) or self.format)(value)


class Table(NamedTuple):
    """Table as text for terminal, Markdown and page; sections names the part of the table of each line."""

    title: str
    heads: list[str]
    lines: list[list[str]]
    note: str = ""
    sections: Sequence[str] = ()


def make_table(
    title: str,
    columns: Sequence[Column],
    rows: Iterable[Any],
    note: str = "",
    sections: Sequence[str] = (),
    brief: bool = False,
) -> Table:
    """Fill in the columns for every row; their notes follow `note`."""
    note = " ".join(filter(None, [note, *(column.note for column in columns)]))
    lines = [[column.cell(row, brief) for column in columns] for row in rows]
    return Table(title, [column.heading for column in columns], lines, note, sections)


# Texts of values ----------------------------------------------------------------------------------------------------


def percent(metric: dict, errors: bool = True) -> str:
    """Mean and standard error of a metric, as "71.2 ± 1.0"; "–" for an empty one."""
    if not metric["n"]:
        return UNKNOWN
    mean, error, sd = f"{100 * metric['mean']:.1f}", metric["se"], metric.get("sd")
    if sd is not None and errors:
        return f"{mean} ± {100 * sd:.1f} sd"
    if errors and error is not None and error == error:
        return f"{mean} ± {100 * error:.1f}"
    return mean


def mean_percent(metric: dict) -> str:
    """Mean of a metric without its error."""
    return percent(metric, errors=False)


def ratio(value: float) -> str:
    """Fraction in percent."""
    return f"{100 * value:.1f} %"


def digits(value: float) -> str:
    """Number with four significant digits."""
    return f"{value:.4g}"


def interval(comparison: dict) -> str:
    """Difference with its interval in points, as "+2.1 [+0.4, +3.9]"."""
    low, high = comparison["interval"]
    between = "" if low is None or low != low else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * comparison['difference']:+.1f}{between}"


def compared(comparison: dict) -> str:
    """Paired comparison, as "-3.1 [-4.7, -1.5] (p=0.002)"; without p if a row is a mean over seeds."""
    if comparison["se"] is None or comparison["n"] == 0:
        return UNKNOWN
    p = comparison["p"]
    shown = "" if p is None else " (p<0.001)" if p < 0.001 else f" (p={p:.3f})"
    return interval(comparison) + shown


# The main table -----------------------------------------------------------------------------------------------------

NO_DENSE = "no dense run"


def dense(results: list[Result]) -> Result | None:
    """Unpruned row on the same model, data and code, the basis of percentages; None if there is none."""
    first = results[0]
    same = (r for r in results if (r.model, r.data, r.code) == (first.model, first.data, first.code))
    return next((result for result in same if result.pruner.get("name") == "none"), None)


def share(value: float | None, whole: float | None) -> float | str | None:
    """Fraction of the dense run's value, or `NO_DENSE`."""
    if whole is None:
        return NO_DENSE
    return value / whole if value is not None and whole else None


def families_of(results: list[Result]) -> list[str]:
    """Families of questions of all rows; a row lacks those whose questions all failed."""
    return _groups(results, "accuracy/")


def levels_of(results: list[Result]) -> list[str]:
    """Levels of difficulty of all rows, as "size: small"."""
    return _groups(results, "difficulty/")


def _groups(results: list[Result], prefix: str) -> list[str]:
    names = dict.fromkeys(name for result in results for name in result.metrics)
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def metric(heading: str, name: str, note: str = "", brief: Callable[[Any], str] | None = mean_percent) -> Column:
    """Column of a metric in percent; a terminal shows its mean alone."""
    return Column(heading, lambda result: result.metrics.get(name), percent, note, brief)


def columns(results: list[Result], comparisons: dict) -> list[Column]:
    """Columns of the main table that these results have."""
    families, against = families_of(results), list(comparisons[results[0].label])
    names = own(results[0].metrics)
    base = dense(results)
    whole, best = base and base.tflops["total"], base and principal(base.metrics)["mean"]

    def difference(other: str) -> Column:
        value = lambda r: "" if other == r.label else comparisons[r.label][other]  # noqa: E731
        return Column(f"− {other}", value, compared)

    def agreement(result: Result) -> float | None:
        value = comparisons[result.label][against[0]]["agreement"]
        return value if value == value else None

    def any_has(name: str, *some: Column) -> tuple[Column, ...]:
        return some if any(getattr(result, name) for result in results) else ()

    return [
        Column("row", lambda r: r.label),
        metric("accuracy", "accuracy", brief=None),
        Column("budget", lambda r: in_words(r.budget) if any(r.cuts.values()) else None),
        Column("tokens", lambda r: r.tokens[-1]),
        Column("average tokens", lambda r: r.average_tokens, digits, AVERAGE),
        Column("GFLOPs", lambda r: 1e3 * r.tflops["total"], digits, GFLOPS),
        Column("of unpruned", lambda r: share(r.tflops["total"], whole), ratio),
        # Of one family the accuracy says it all.
        *(metric(family, f"accuracy/{family}") for family in families if len(families) > 1),
        *([metric("top5", "top5", TOP5)] if any("top5" in result.metrics for result in results) else []),
        *(Column(name.partition("/")[2] or name, lambda r, name=name: r.metrics.get(name), number) for name in names),
        *([Column("of dense", lambda r: share(principal(r.metrics)["mean"], best), ratio)] if names else []),
        *map(difference, against),
        Column("agrees", agreement, lambda value: f"{100 * value:.1f}", "agrees: same answer as the first row."),
        metric("early accuracy", "early_accuracy", "early accuracy: of the answer read out after part 1."),
        metric("hit rate", "hit_rate", "hit rate: fraction of questions with a kept token on the target patches."),
        metric("target share", "target_share", "target share: of the kept tokens, those on the target patches."),
        Column("questions/s", rate, str, "questions/s: * with work shared between rows."),
        *any_has("failed", Column("failed", lambda r: r.failed["n"] if r.failed else 0, str, FAILED)),
        *any_has(
            "words",
            Column("words", lambda r: r.words and r.words["passing"], lambda value: f"{value:.2f}", WORDS),
            Column("no word", lambda r: r.words and r.words["none"], lambda value: f"{100 * value:.0f} %"),
        ),
        *any_has(
            "paper",
            Column("paper: drop", lambda r: paper.drop(r.paper)),
            Column("paper: cost", lambda r: paper.cost(r.paper), str, PAPER),
        ),
    ]


GFLOPS = "GFLOPs: all layers of the tower, as the IVTP paper counts."
AVERAGE = "average tokens: visual tokens that enter a language layer."
TOP5 = "top5: the right class is among the five likeliest."
FAILED = (
    "failed: samples without a result, left out of every number; where rows have other ones, only the paired differences "
    "are about the same questions."
)
PAPER = f"paper: the same row there, on LLaVA-1.5; {paper.NOTE}"
WORDS = "words: of the instruction that pass τ, per question; no word: questions without any."


def rate(result: Result) -> str | None:
    """Questions per second; an asterisk marks a row that shared work, whose rate says nothing about its method."""
    rate = result.speed.get("questions_per_second")
    return f"{rate:.0f}{'*' if result.speed.get('shared') else ''}" if rate else None


def main_table(results: list[Result], comparisons: dict, brief: bool = False) -> Table:
    """Main table of an experiment; brief: for a terminal, with the standard error of the accuracy alone."""
    sections = [result.section for result in results]
    title = results[0].experiment
    return make_table(title, columns(results, comparisons), results, preamble(results), sections, brief)


def image_settings(results: list[Result]) -> list[str]:
    """Settings of image preparation: one phrase each."""
    model = results[0].model
    square = {"pad": "images padded to a square", "crop": "images cropped to a square at the centre"}
    phrases = [square[model["image_padding"]]] if model.get("image_padding") in square else []
    if model.get("max_crops"):
        fewer = results[0].fewer_crops
        counted = "" if fewer is None else f" ({fewer} would have had more)"
        phrases.append(f"images cut into at most {model['max_crops']} crops{counted}")
    if model.get("max_pixels"):
        phrases.append(f"images of at most {model['max_pixels']} pixels")
    return phrases


DATA = {
    "task": "task {}",
    "path": "{}",
    "styles": "styles {}",
    "split": "{} split",
    "seed": "seed {}",
    "scenes": "{} scenes",
    "limit": "the first {} samples",
}
"""Settings of a data set that say which samples were evaluated, in words."""


def data_set(data: dict) -> str:
    """Samples that were evaluated, as "scenes2, test split, seed 0, 250 scenes"; the page's foot has all settings."""
    known = ((phrase, data[key]) for key, phrase in DATA.items() if data.get(key) is not None)
    texts = (phrase.format(" and ".join(value) if isinstance(value, list) else value) for phrase, value in known)
    return ", ".join([data["name"], *texts])


def preamble(results: list[Result]) -> str:
    """Note on all numbers of the main table; the notes of its columns follow."""
    metrics = results[0].metrics
    n, images = principal(metrics)["n"], metrics["images"]
    parts = [f"Data: {data_set(results[0].data)}."]
    parts += [f"{phrase[0].upper()}{phrase[1:]}." for phrase in image_settings(results)]
    if "score" in metrics:
        parts.append(
            f"Metrics of the benchmark task are in their own unit; of dense: {metrics['score']['name']}, in % of the "
            "unpruned run's. accuracy: score of each answer alone."
        )
    parts.append(
        f"Accuracy in %, n = {n} questions about {images} images, ± standard error (images as clusters; sd: between seeds); "
        "differences are paired on the same questions, with 95 % bootstrap intervals over images, p by McNemar's exact test."
    )
    return " ".join(parts)


# Markdown -----------------------------------------------------------------------------------------------------------


def markdown(table: Table, level: int = 2) -> str:
    """Text of a table in Markdown, below its title."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(map(escape, cells)) + " |"

    lines = [f"{'#' * level} {escape(table.title)}", "", line(table.heads)]
    lines.append("|---" + "|--:" * (len(table.heads) - 1) + "|")
    section = ""
    for i, cells in enumerate(table.lines):
        if table.sections and table.sections[i] != section:
            section = table.sections[i]
            lines += [f"| *{escape(section)}* |" + " |" * (len(table.heads) - 1)] if section else []
        lines.append(line(cells))
    return "\n".join([*lines, *(["", escape(table.note)] if table.note else []), ""])


def escape(text: str) -> str:
    """Escape a text so that it cannot leave its cell, be read as HTML or code, or load an image."""
    text = one_line(text.replace("\n", " ")).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("|", "\\|").replace("`", "\\`").replace("](", "]\\(")
