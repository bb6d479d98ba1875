"""`python experiments/where/where.py OUTPUTS/table1`: where a method wins or loses, by family and difficulty.

Paired differences of the row that the experiment compares with minus every other one but the unpruned, per family and
per level of difficulty, with 95 % bootstrap intervals over images. Writes where.png and where.json beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

from ivtp import records
from ivtp.data.failures import answered
from ivtp.evaluation.statistics import compare
from ivtp.report.__main__ import finished
from ivtp.report.claims import together

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def groups(outcome: dict) -> list[str]:
    """What a question counts for: its family and its levels of difficulty."""
    return [outcome["family"], *(f"{name}: {level}" for name, level in sorted(outcome.get("difficulty", {}).items()))]


def differences(folder: Path) -> tuple[str, dict[str, dict[str, dict]]]:
    """Name of the compared row, and {other row: {group: n, difference and interval}}."""
    rows, about = finished(folder)
    found = {row["label"]: answered(records.read(folder / "outcomes" / f"{row['key']}.jsonl")[0]) for row in rows}
    rows, found = together(rows, found)
    ours = about["compare_to"]
    names = sorted({name for outcome in found[ours] for name in groups(outcome)}, key=lambda name: (": " in name, name))
    result: dict[str, dict[str, dict]] = {}
    for row in rows[1:]:
        if row["label"] == ours:
            continue
        result[row["label"]] = {}
        for name in names:
            pair = ([o for o in found[label] if name in groups(o)] for label in (ours, row["label"]))
            compared = compare(*pair)
            result[row["label"]][name] = {key: compared[key] for key in ("n", "difference", "interval")}
    return ours, result


def draw(ours: str, result: dict[str, dict[str, dict]], path: Path) -> None:
    """One panel per other method; right of zero `ours` is better."""
    figure, panels = plt.subplots(
        1, len(result), figsize=(2.1 * len(result) + 1.4, 5.2), sharey=True, sharex=True, layout="constrained"
    )
    for axes, (other, by_group) in zip(panels, result.items(), strict=True):
        for place, found in enumerate(by_group.values()):
            low, high = (100 * end for end in found["interval"])
            color = "tab:green" if low > 0 else "tab:red" if high < 0 else "0.5"
            axes.plot([low, high], [place, place], color=color, linewidth=1.6)
            axes.plot(100 * found["difference"], place, "o", color=color, markersize=4)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_title(f"− {other}", fontsize=9)
        axes.set_yticks(range(len(by_group)), by_group, fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.supxlabel(f"{ours} minus the other, points", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "results.jsonl").is_file():
        print(__doc__.strip(), file=sys.stderr)
        return 2
    ours, result = differences(Path(arguments[0]))
    draw(ours, result, HERE / "where.png")
    (HERE / "where.json").write_text(json.dumps({"ours": ours, "against": result}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
