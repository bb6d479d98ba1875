"""`python experiments/where/where.py OUTPUTS/table1`: where a method wins or loses, by family and difficulty.

Paired differences of the row that the experiment compares with minus every other one but the unpruned, per family and
per level of difficulty, with 95 % bootstrap intervals over images. Writes where.png and where.json beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

from ivtp.data.failures import answered
from ivtp.evaluation.statistics import compare
from ivtp.report.claims import together
from ivtp.results import finished, read_outcomes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def groups(outcome: dict) -> list[str]:
    """Groups of a question: its family and its levels of difficulty."""
    return [outcome["family"], *(f"{name}: {level}" for name, level in sorted(outcome.get("difficulty", {}).items()))]


def differences(folder: Path) -> tuple[str, dict[str, dict[str, dict]]]:
    """Name of the compared row, and {other row: {group: n, difference and interval}}."""
    results, about = finished(folder)
    outcomes = {r.label: answered(read_outcomes(folder / "outcomes" / f"{r.key}.jsonl")) for r in results}
    if missing := [label for label, found in outcomes.items() if not found]:
        raise SystemExit(f"{folder}/outcomes has none of {', '.join(missing)}; give the folder that a run wrote")
    results, outcomes = together(results, outcomes)
    ours = about["compare_to"]
    names = {name for outcome in outcomes[ours] for name in groups(outcome)}
    against: dict[str, dict[str, dict]] = {}
    for other in (result.label for result in results[1:] if result.label != ours):
        against[other] = {}
        for name in sorted(names, key=lambda name: (": " in name, name)):
            pair = ([o for o in outcomes[label] if name in groups(o)] for label in (ours, other))
            compared = compare(*pair)
            against[other][name] = {key: compared[key] for key in ("n", "difference", "interval")}
    return ours, against


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
