"""Copy the notebooks and the pages of the experiments into the source folder of the build, where Sphinx reads them."""

import shutil
from pathlib import Path

DOCS = Path(__file__).parent.parent
PATTERNS = (
    "notebooks/*.ipynb",
    "experiments/README.md",
    "experiments/*/*.md",
    "experiments/*/*.png",
    "experiments/*/*.jpg",
    "experiments/speed/*.jsonl",
)
LEFT_OUT = ("card.md",)  # a template


def copy(app) -> None:
    """Bring the copies up to date; the times of files are kept, so that unchanged pages are not built again."""
    root, current = DOCS.parent, set()
    for pattern in PATTERNS:
        for source in (path for path in root.glob(pattern) if path.name not in LEFT_OUT):
            target = DOCS / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
            current.add(target)
    for folder in ("notebooks", "experiments"):
        for target in (DOCS / folder).rglob("*"):
            if target.is_file() and target not in current:
                target.unlink()


def setup(app) -> dict:
    app.connect("builder-inited", copy)
    return {"parallel_read_safe": True}
