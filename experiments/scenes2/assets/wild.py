"""Hand-picked clip art for the `wild` split: wild.txt names a file for a concept."""

from pathlib import Path

from PIL import Image

from experiments.scenes2.assets import sprites

SOURCE = "Debian openclipart-png 1:0.18+dfsg-19"
AUTHOR = "Open Clip Art Library contributors; the title names them"


def sheet(folder: Path, target: Path) -> tuple[dict[str, list[int]], list[dict]]:
    """The sheet of clip art. Returns the cells of each concept, and the credits."""
    root = folder / "openclipart-png/usr/share/openclipart/png"
    cells, views, credits = [], {}, []
    for line in (Path(__file__).parent / "wild.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, path = line.partition(": ")
        views.setdefault(name, []).append(len(cells))
        credits.append(
            {"sheet": "wild", "cell": len(cells), "shows": name, "title": path, "author": AUTHOR}
            | {"licence": "public domain", "source": SOURCE}
        )
        cells.append(sprites.fit(Image.open(root / path).convert("RGBA")))
    if cells:
        sprites.pack(cells, target / "wild.webp")
    return views, credits
