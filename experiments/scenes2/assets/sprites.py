"""Draw every concept in every style as a 64-pixel sprite, and pack the sprites of a style into one WebP sheet."""

import io
import json
import multiprocessing
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.scenes2.assets import fetch
from experiments.scenes2.assets.concepts import Concept

CELL, COLUMNS = 64, 24
ICONIFY = ("noto", "noto-v1", "fluent-flat", "emojione", "twemoji")
STYLES = ("noto", "noto-v1", "fluent-flat", "fluent-3d", "emojione", "twemoji")
LICENCES = {
    "noto": ("Apache-2.0", "Google Inc."),
    "noto-v1": ("Apache-2.0", "Google Inc."),
    "fluent-flat": ("MIT", "Microsoft Corporation"),
    "fluent-3d": ("MIT", "Microsoft Corporation"),
    "emojione": ("CC-BY-4.0", "EmojiTwo contributors"),
    "twemoji": ("CC-BY-4.0", "Twitter, Inc and other contributors"),
}
QUALITY = 82
# Drawings that do not show what the concept says in that style, found by looking at the sheets.
REJECTED: dict[str, set[str]] = json.loads((Path(__file__).parent / "rejected.json").read_text())


def hexcodes(folder: Path) -> dict[str, str]:
    """Emoji label to code points, as in 1f436 or 2602-fe0f."""
    table = json.loads((folder / "emojibase/en/data.json").read_text())
    return {entry["label"]: entry["hexcode"].lower() for entry in table}


@cache
def _icons(folder: Path, style: str) -> tuple[dict, dict]:
    icons = json.loads((folder / style / "icons.json").read_text())
    return icons, json.loads((folder / style / "chars.json").read_text())


def _svg(folder: Path, style: str, code: str) -> str | None:
    icons, chars = _icons(folder, style)
    if not chars:  # the set lists no code points; its names are Twemoji's
        chars = _icons(folder, "twemoji")[1]
    name = chars.get(code) or chars.get(code.replace("-fe0f", "")) or chars.get(f"{code}-fe0f")
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'width="256" height="256">{icon["body"]}</svg>'
    )


def _draw(job: tuple[Path, str, str]) -> bytes | None:
    """A PNG of one emoji in one style; None where the style lacks it."""
    folder, style, code = job
    if style == "fluent-3d":
        files = [folder / style / "assets" / f"{c}.webp" for c in (code, code.replace("-fe0f", ""), f"{code}-fe0f")]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            return None
        image = Image.open(file).convert("RGBA")
    else:
        import cairosvg

        svg = _svg(folder, style, code)
        if svg is None:
            return None
        image = Image.open(io.BytesIO(cairosvg.svg2png(svg.encode(), output_width=256, output_height=256)))
    out = io.BytesIO()
    fit(image.convert("RGBA")).save(out, "PNG")
    return out.getvalue()


def fit(image: Image.Image) -> Image.Image:
    """Crop to what is opaque and centre it in a cell, its longer side 62 pixels."""
    box = image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
    image = image.crop(box)
    scale = (CELL - 2) / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return cell


def pack(cells: list[Image.Image], path: Path) -> None:
    """Write a sheet of cells, row by row."""
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    sheet.save(path, "WEBP", quality=QUALITY, alpha_quality=70, method=6)


def _same(a: Image.Image, b: Image.Image) -> bool:
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() < 1.0


def emoji_sheets(folder: Path, concepts: list[Concept], target: Path) -> tuple[dict, list[dict]]:
    """Sheets of all emoji styles. Returns the cells of each concept by style, and the credits."""
    codes = hexcodes(folder)
    views: dict[str, dict[str, list[int]]] = {concept.name: {} for concept in concepts}
    credits = []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for style in STYLES:
            jobs = [(c.name, label) for c in concepts for label in c.labels if style not in REJECTED.get(label, ())]
            drawn = pool.map(_draw, [(folder, style, codes[label]) for _, label in jobs], chunksize=8)
            cells = []
            for (name, label), png in zip(jobs, drawn, strict=True):
                if png is None:
                    continue
                views[name].setdefault(style, []).append(len(cells))
                licence, author = LICENCES[style]
                credits.append(
                    {
                        "sheet": style,
                        "cell": len(cells),
                        "shows": name,
                        "title": label,
                        "author": author,
                        "licence": licence,
                    }
                    | {"source": fetch.NPM[style]}
                )
                cells.append(Image.open(io.BytesIO(png)))
            pack(cells, target / f"{style}.webp")
    return views, credits


def furniture_sheet(folder: Path, concepts: list[Concept], target: Path) -> tuple[dict[str, list[int]], list[dict]]:
    """The sheet of furniture renders, views that are alike left out."""
    entries = fetch.furniture(folder)
    cells, credits, views = [], [], {}
    for concept in concepts:
        mine: list[Image.Image] = []
        for entry in entries:
            if entry["name"] not in concept.furniture or "furniture" in REJECTED.get(entry["icon"].stem, ()):
                continue
            cell = fit(Image.open(entry["icon"]).convert("RGBA"))
            if any(_same(cell, other) for other in mine):
                continue
            mine.append(cell)
            views.setdefault(concept.name, []).append(len(cells))
            credits.append(
                {"sheet": "furniture", "cell": len(cells), "shows": concept.name, "title": entry["icon"].stem}
                | {"author": entry["creator"], "licence": entry["licence"]}
                | {"source": f"Debian sweethome3d-furniture 1.8, {entry['catalogue']}.sh3f"}
            )
            cells.append(cell)
    pack(cells, target / "furniture.webp")
    return views, credits
