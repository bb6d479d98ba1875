"""Licence texts and the credits of every picture."""

import csv
import json
from pathlib import Path

from experiments.scenes2.assets import fetch

TEXTS = ("Apache-2.0", "MIT", "CC-BY-3.0", "CC-BY-3.0-US", "CC-BY-4.0", "CC0-1.0", "OFL-1.1")
COLUMNS = ("sheet", "cell", "shows", "title", "author", "licence", "source")
NOTICE = """The pictures, glyphs and word pieces of this folder come from the packages below, each under its own licence; the
texts are beside this file, the credits of every single picture in credits.csv. Pictures were cropped, scaled to 64 pixels (fonts
to 40) and packed into sheets; panoramas were tone-mapped.

{table}

word pieces (llama/tokenizer.json): PyPI mistral-common, tokenizer.model.v1, Apache-2.0, Mistral AI, restricted to the ids in use
word pieces (clip/tokenizer.json): PyPI open_clip_torch, bpe_simple_vocab_16e6, MIT, OpenAI, restricted to the ids in use
names and synonyms: npm {emojibase}, MIT, Miles Johnson, and by hand
Open Clip Art is in the public domain by its authors' dedication (Debian openclipart-png, debian/copyright).
MIT copyrights: (c) Microsoft Corporation (Fluent emoji); (c) 2021 OpenAI (CLIP); (c) 2017 Miles Johnson (emojibase).
"""


def write(folder: Path, target: Path, credits: list[dict]) -> None:
    """LICENSES/: one text per licence, NOTICE.txt and credits.csv."""
    out = target / "LICENSES"
    out.mkdir()
    for name in TEXTS:
        text = json.loads((folder / f"spdx/licenses/{name}.json").read_text())["licenseText"]
        (out / f"{name}.txt").write_text(text.rstrip() + "\n", encoding="utf-8")
    kinds = sorted({(c["source"].split(",")[0], c["licence"]) for c in credits})
    lines = "\n".join(f"{source}: {licence}" for source, licence in kinds)
    (out / "NOTICE.txt").write_text(NOTICE.format(table=lines, emojibase=fetch.NPM["emojibase"]), encoding="utf-8")
    with (out / "credits.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(credits)
