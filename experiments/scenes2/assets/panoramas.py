"""Tone-map the photographed panoramas and glyphs of real fonts into the images that scenes are made of."""

import base64
import json
import re
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.scenes2.assets import fetch

# What a question about the place answers, and what the photograph itself shows: never asked about there.
PLACES = {
    "apartment": ("room", "indoors", "window door lamp table"),
    "bridge": ("corridor", "indoors", "window hotel bank hospital school house"),
    "city": (
        "town",
        "outdoors",
        "house hotel bank hospital school store bench cloud lamppost tree oak traffic light church car",
    ),
    "dawn": ("desert", "outdoors", "cloud stone bush sun"),
    "esplanade": ("hall", "indoors", "lamp store television window"),
    "forest": ("forest", "outdoors", "oak pine log stone sun bush sprout maple leaf"),
    "hall": ("hall", "indoors", "lamp window television chandelier"),
    "lab": ("factory", "indoors", "window computer table workbench desk box"),
    "lobby": ("hall", "indoors", "bench sofa table lamp television window door trash can"),
    "night": ("field", "outdoors", "oak bush star moon"),
    "park": ("field", "outdoors", "oak bush house cloud sun church"),
    "sky": ("sea", "outdoors", "cloud sun drop"),
    "studio": ("studio", "indoors", "umbrella lamp bulb parasol chair camera stool"),
    "sunrise": ("field", "outdoors", "oak bush sun house"),
    "sunset": ("town", "outdoors", "church lamppost house castle motorboat ship sun"),
    "venice": ("sea", "outdoors", "house cloud oak bush bench ship tree"),
    "warehouse": ("factory", "indoors", "window lamp box crate"),
    "workshop": ("factory", "indoors", "window lamp box workbench table fire extinguisher crate"),
}
HELD_OUT = ("lobby", "sunrise", "warehouse")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789$"
FONTS = {
    "train": ("roboto", "oswald", "bitter", "courier-prime", "bangers", "lora"),
    "validation": ("fira-sans",),
    "test": ("merriweather", "montserrat"),
}
HEIGHT = 40


def panoramas(folder: Path, target: Path) -> tuple[list[dict], list[dict]]:
    """All panoramas below each other in one WebP, 512x256 each."""
    import OpenEXR

    rows, credits, images = [], [], []
    for index, (name, (place, where, shows)) in enumerate(PLACES.items()):
        text = (folder / f"pmndrs/hdri/{name}.exr.js").read_text()
        with tempfile.NamedTemporaryFile(suffix=".exr") as file:
            file.write(base64.b64decode(re.search(r"base64,([^\"'`]+)", text)[1]))
            file.flush()
            with OpenEXR.File(file.name) as exr:
                channels = exr.channels()
                pixels = np.array(channels["RGB"].pixels if "RGB" in channels else channels["RGBA"].pixels[..., :3])
        pixels = mended(pixels.astype(np.float32))
        key = np.exp(np.log(pixels @ np.array([0.2126, 0.7152, 0.0722], np.float32) + 1e-4).mean())
        toned = pixels * (0.22 / key)
        toned = (toned / (1 + 0.6 * toned)).clip(0, 1) ** (1 / 2.2)
        images.append(Image.fromarray((255 * toned).round().astype(np.uint8)))
        split = "test" if name in HELD_OUT else "train"
        rows.append({"name": name, "place": place, "where": where, "shows": _listed(shows), "split": split})
        credits.append(
            {"sheet": "panoramas", "cell": index, "shows": place, "title": name, "author": "Poly Haven contributors"}
            | {"licence": "CC0-1.0", "source": fetch.NPM["pmndrs"]}
        )
    width, height = images[0].size
    stack = Image.new("RGB", (width, height * len(images)))
    for index, image in enumerate(images):
        stack.paste(image, (0, index * height))
    stack.save(target / "panoramas.webp", "WEBP", quality=82, method=6)
    return rows, credits


def mended(pixels: np.ndarray) -> np.ndarray:
    """Pixels without light or with infinitely much, which ring around lamps and the sun, as the mean of their neighbours."""
    bad = ~np.isfinite(pixels).all(-1) | (pixels.max(-1) >= 6e4) | (np.nan_to_num(pixels).sum(-1) <= 0)
    weight = np.pad((~bad).astype(np.float32), 2, mode="edge")
    clean = np.pad(np.where(bad[..., None], 0, pixels.clip(0, 6e4)), ((2, 2), (2, 2), (0, 0)), mode="edge")
    total, count = (np.lib.stride_tricks.sliding_window_view(a, (5, 5), (0, 1)).sum((-1, -2)) for a in (clean, weight))
    return np.where(bad[..., None], total / count.clip(1)[..., None], pixels.clip(0, 6e4)).astype(np.float32)


def _listed(text: str) -> list[str]:
    for name in ("traffic light", "trash can", "maple leaf", "fire extinguisher"):
        text = text.replace(name, name.replace(" ", "_"))
    return [word.replace("_", " ") for word in text.split()]


def glyphs(folder: Path, target: Path) -> tuple[dict, list[dict]]:
    """One greyscale atlas: a row per font, a cell per character, and the advance widths."""
    from fontTools.ttLib import TTFont

    names = [name for fonts in FONTS.values() for name in fonts]
    atlas = Image.new("L", (len(CHARACTERS) * HEIGHT, len(names) * HEIGHT))
    table, credits = {}, []
    for row, name in enumerate(names):
        weight = 400 if name == "bangers" else 700
        font = TTFont(folder / f"font-{name}/files/{name}-latin-{weight}-normal.woff")
        font.flavor = None
        with tempfile.NamedTemporaryFile(suffix=".ttf") as file:
            font.save(file.name)
            drawn = ImageFont.truetype(file.name, 200, layout_engine=ImageFont.Layout.BASIC)
        top = min(drawn.getbbox(c)[1] for c in CHARACTERS)
        scale = (HEIGHT - 4) / (max(drawn.getbbox(c)[3] for c in CHARACTERS) - top)
        widths = []
        for column, character in enumerate(CHARACTERS):
            advance = drawn.getlength(character)
            big = Image.new("L", (400, 400))
            ImageDraw.Draw(big).text((40, 40 - top), character, font=drawn, fill=255)
            left = round((HEIGHT - advance * scale) / 2)  # centred: cells overlap by their empty margins
            size = round(400 * scale)
            small = big.resize((size, size), Image.Resampling.LANCZOS)
            cell = Image.new("L", (HEIGHT, HEIGHT))
            cell.paste(small, (left - round(40 * scale), 2 - round(40 * scale)))
            atlas.paste(cell, (column * HEIGHT, row * HEIGHT))
            widths.append(round(advance * scale))
        table[name] = {"row": row, "widths": widths}
        credits.append(
            {"sheet": "glyphs", "cell": row, "shows": CHARACTERS, "title": name, "licence": "OFL-1.1"}
            | {"author": author(folder, name), "source": fetch.NPM[f"font-{name}"]}
        )
    atlas.save(target / "glyphs.png", optimize=True)
    return {"height": HEIGHT, "characters": CHARACTERS, "fonts": table, "splits": FONTS}, credits


def author(folder: Path, name: str) -> str:
    first = (folder / f"font-{name}/LICENSE").read_text().split("\n")[0]
    if json.loads((folder / f"font-{name}/package.json").read_text())["license"] != "OFL-1.1":
        raise ValueError(f"font {name} is not under OFL-1.1; choose another")
    return re.sub(r"\.? \S+\.ttf:.*", "", first).strip()
