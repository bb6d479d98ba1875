"""`python experiments/collect.py OUTPUTS [NAME ...]`: take finished results into experiments/, and write the table of claims.

Of each experiment: results.jsonl, blind.jsonl, costs.jsonl, claims.json, experiment.json, table.md, and pictures below
300 kB. The tables in the READMEs stand between two marks and are written from those files alone, never by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ivtp.report.claims import HEADS, lines

HERE = Path(__file__).parent
FILES = ("results.jsonl", "blind.jsonl", "costs.jsonl", "claims.json", "experiment.json", "table.md")
LARGEST = 300_000
CLAIMS, RESULT = "claims", "result"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    outputs, names = Path(arguments[0]), arguments[1:]
    names = names or sorted(p.name for p in outputs.iterdir() if (p / "table.md").is_file())
    for name in names:
        if not (outputs / name / "table.md").is_file():
            print(f"{outputs / name} has no table.md; run experiment={name} first", file=sys.stderr)
            return 2
        collect(outputs / name, HERE / name)
    write_claims(HERE)
    return 0


def collect(source: Path, target: Path) -> None:
    """Copy what is worth keeping, only the records of the last run, and put the table into the README."""
    target.mkdir(exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    about = target / "experiment.json"
    if about.is_file() and (target / "results.jsonl").is_file():
        keys = json.loads(about.read_text(encoding="utf-8")).get("keys", [])
        records = {json.loads(line)["key"]: line for line in (target / "results.jsonl").read_text().splitlines()}
        (target / "results.jsonl").write_text("".join(records[key] + "\n" for key in keys if key in records))
    for picture in source.glob("*.png"):
        if picture.stat().st_size <= LARGEST:
            shutil.copyfile(picture, target / picture.name)
        else:
            print(f"{picture} has {picture.stat().st_size} bytes and is left out", file=sys.stderr)
    readme = target / "README.md"
    if readme.is_file():
        table = (target / "table.md").read_text(encoding="utf-8")
        table = re.sub(r"^# .*\n+", "", table)  # the README has a title of its own
        pictures = "".join(f"\n![{p.stem.replace('_', ' ')}]({p.name})\n" for p in sorted(target.glob("*.png")))
        between(readme, RESULT, re.sub(r"^## ", "### ", table, flags=re.M).strip() + "\n" + pictures)


def write_claims(folder: Path) -> None:
    """The table of all claims, in the order of the experiments' names."""
    judged = []
    for path in sorted(folder.glob("*/claims.json")):
        judged += json.loads(path.read_text(encoding="utf-8"))
    rows = ["| " + " | ".join([*HEADS, "experiment"]) + " |", "|---|--:|--:|--:|---|---|"]
    for claim, line in zip(judged, lines(judged), strict=True):
        name = claim["experiment"]
        rows.append(
            "| " + " | ".join([*(cell.replace("|", "\\|") for cell in line), f"[{name}]({name}/README.md)"]) + " |"
        )
    between(folder / "README.md", CLAIMS, "\n".join(rows) + "\n")


def between(path: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->`."""
    found = path.read_text(encoding="utf-8")
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    if found.count(start) != 1 or found.count(end) != 1:
        raise SystemExit(f"{path} must contain {start.strip()} and {end} once each")
    before, rest = found.split(start)
    path.write_text(before + start + text + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
