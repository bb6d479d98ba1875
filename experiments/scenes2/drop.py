"""Table of two models side by side: trained on for as long, on all tokens and on randomly dropped ones.

    python -m experiments.scenes2.drop outputs/table1_on outputs/table1_drop

The folders hold `python -m ivtp.run experiment=table1 data.scenes=250 model.source=FOLDER/model name=…` of the two models.
Differences are paired on the same questions, in points, with 95 % bootstrap intervals over images.
"""

import sys
from pathlib import Path

from ivtp import results as store
from ivtp.evaluation.statistics import compare
from ivtp.report.claims import together


def rows_of(folder: Path) -> dict[str, list]:
    """Outcomes of each row of a folder, seeds as one."""
    results, _ = store.finished(folder)
    outcomes = {result.label: store.outcomes_of(folder, result) for result in results}
    return together(results, outcomes)[1]


def points(rows: dict[str, list], others: dict[str, list], label: str, other: str) -> str:
    """Difference of two rows in points, with its interval."""
    result = compare(rows[label], others[other])
    low, high = (100 * bound for bound in result["interval"])
    return f"{100 * result['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def main(arguments: list[str]) -> None:
    """Print the table."""
    plain, dropped = (rows_of(Path(folder)) for folder in arguments)
    print("| row | all tokens | dropped tokens | dropped − all | − random, all | − random, dropped |")
    print("|---|--:|--:|--:|--:|--:|")
    for label, rows in plain.items():
        means = [100 * sum(o["correct"] for o in some) / len(some) for some in (rows, dropped[label])]
        chance = [points(some, some, label, "random") if label != "random" else "" for some in (plain, dropped)]
        print(
            "|", " | ".join([label, *(f"{m:.1f}" for m in means), points(dropped, plain, label, label), *chance]), "|"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
