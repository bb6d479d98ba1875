"""`python experiments/collect.py OUTPUTS [NAME ...]`: copy finished results into experiments/, and write the table of claims.

Of each experiment: results.jsonl, blind.jsonl, costs.jsonl, claims.json, experiment.json, table.md, and pictures below
300 kB. The READMEs link the table and show the pictures between two marks; the table of claims is written from those files
alone, never by hand.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ivtp.report.claims import table
from ivtp.report.tables import escape

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
    """Copy the files that are kept, only the results of the last run, and link the table in the README."""
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
        pictures = "".join(f"\n![{p.stem.replace('_', ' ')}]({p.name})\n" for p in sorted(target.glob("*.png")))
        between(readme, RESULT, f"All numbers: [table.md](table.md).\n{pictures}")


def write_claims(folder: Path) -> None:
    """The table of all claims, in the order of the experiments' names."""
    judged = []
    for path in sorted(folder.glob("*/claims.json")):
        judged += json.loads(path.read_text(encoding="utf-8"))
    shown = table(judged)
    rows = ["| " + " | ".join([*shown.heads, "experiment"]) + " |", "|---|--:|--:|--:|---|---|"]
    for claim, line in zip(judged, shown.lines, strict=True):
        link = f"[{claim['experiment']}]({claim['experiment']}/README.md)"
        rows.append("| " + " | ".join([*map(escape, line), link]) + " |")
    between(folder / "README.md", CLAIMS, "\n".join(rows) + "\n")


def between(path: Path, mark: str, text: str) -> None:
    """Replace the text between `<!-- mark -->` and `<!-- /mark -->`."""
    page = path.read_text(encoding="utf-8")
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise SystemExit(f"{path} must contain {start.strip()} and {end} once each")
    before, rest = page.split(start)
    path.write_text(before + start + text + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
