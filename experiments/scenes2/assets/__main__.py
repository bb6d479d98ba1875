"""Rebuild ivtp/assets/scenes2 from the registries: `python -m experiments.scenes2.assets`."""

import argparse
import json
import shutil
from pathlib import Path

from experiments.scenes2.assets import concepts, fetch, licences, panoramas, sprites, tokens, wild

TARGET = Path(__file__).resolve().parents[3] / "ivtp" / "assets" / "scenes2"
MOST = 8e6
LEAST_STYLES = 3  # an emoji concept is drawn in at least so many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, default=Path("outputs/scenes2/sources"), help="downloaded packages")
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args()
    fetch.fetch(options.sources)
    target = options.target.with_name(options.target.name + ".part")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    listed = concepts.read()
    views, credits = sprites.emoji_sheets(options.sources, listed, target)
    furniture, more = sprites.furniture_sheet(options.sources, listed, target)
    credits += more
    clipart, more = wild.sheet(options.sources, target)
    credits += more
    places, more = panoramas.panoramas(options.sources, target)
    credits += more
    glyphs, more = panoramas.glyphs(options.sources, target)
    credits += more
    rows = []
    for concept in listed:
        shown = views[concept.name]
        for sheet, cells in (("furniture", furniture), ("wild", clipart)):
            if concept.name in cells:
                shown[sheet] = cells[concept.name]
        if concept.name not in furniture and len(shown) < LEAST_STYLES:
            raise ValueError(f"{concept.name!r} is drawn in {sorted(shown)} only; remove it from concepts.txt")
        rows.append(
            {"name": concept.name, "synonyms": concept.synonyms, "hypernyms": concept.hypernyms}
            | {"themes": concept.themes, "views": shown}
        )
    table = {"cell": sprites.CELL, "columns": sprites.COLUMNS, "concepts": rows, "places": places, "glyphs": glyphs}
    (target / "index.json").write_text(json.dumps(table, separators=(",", ":"), ensure_ascii=False) + "\n")
    licences.write(options.sources, target, credits)
    shutil.rmtree(options.target, ignore_errors=True)
    target.rename(options.target)
    tokens.write(options.target)
    size = sum(file.stat().st_size for file in options.target.rglob("*") if file.is_file())
    print(f"{len(rows)} concepts, {len(credits)} pictures, {size / 1e6:.2f} MB")
    if size > MOST:
        raise SystemExit(f"the assets hold {size / 1e6:.1f} MB, at most {MOST / 1e6:.0f} are allowed")


if __name__ == "__main__":
    main()
