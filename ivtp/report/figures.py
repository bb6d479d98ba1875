"""Accuracy against cost, and pictures of the tokens that were kept."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from ivtp.data.batches import pictures
from ivtp.data.failures import Failed, read
from ivtp.evaluation.benchmarks import principal
from ivtp.report.viewer import as_seen
from ivtp.text import one_line, shortened

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MARKERS = "osD^vP*Xh<>"


def accuracy_cost(rows: list[dict], path: Path) -> None:
    """Accuracy, or the benchmark's score, with its standard error against FLOPs: one line per series, from its cheapest
    row to its dearest."""
    score, title = rows[0]["metrics"].get("score"), rows[0]["experiment"]
    scale = 1 if score else 100
    rows = [row for row in rows if principal(row["metrics"])["mean"] is not None]
    series: dict[str, list[dict]] = {}
    for row in rows:
        series.setdefault(row.get("series", row["label"]), []).append(row)
    figure, axes = plt.subplots(figsize=(8.5, max(4.6, 0.19 * len(series))), layout="constrained")
    for i, (name, members) in enumerate(series.items()):
        members = sorted(members, key=lambda row: row["tflops"]["total"])
        axes.errorbar(
            [row["tflops"]["total"] * 1e3 for row in members],
            [scale * principal(row["metrics"])["mean"] for row in members],
            yerr=[scale * (principal(row["metrics"])["se"] or 0) for row in members],
            marker=MARKERS[i % len(MARKERS)],
            color=plt.cm.tab10(i % 10),
            linestyle="-" if len(members) > 1 else "none",
            linewidth=1,
            label=plain(name, 48),
            capsize=2,
            markersize=5,
        )
    label = plain(score["name"]) if score else "accuracy (%)"
    axes.set(xlabel="GFLOPs per question, prefill", ylabel=label, title=plain(title))
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, path, dpi=110)


def overlay(image: np.ndarray, kept: list[int], patches: int, asked: np.ndarray | None = None) -> np.ndarray:
    """The image with everything but the kept patches darkened, and the asked patches framed; RGB uint8.

    image  what the model reads (see `viewer.as_seen`): one grid of patches covers all of it
    """
    side = math.isqrt(patches)
    mask = np.zeros(patches, dtype=bool)
    mask[kept] = True
    height, width = image.shape[:2]
    scale = max(1, round(192 / side)) * side
    rows = np.arange(scale) * height // scale
    columns = np.arange(scale) * width // scale
    large = image[rows][:, columns].astype(float)
    cell = scale // side
    light = np.kron(mask.reshape(side, side), np.ones((cell, cell)))[:, :, None]
    large = large * (0.25 + 0.75 * light) + 30 * (1 - light)
    if asked is not None and asked.any():
        area = np.kron(asked.reshape(side, side), np.ones((cell, cell))).astype(bool)
        inner = area.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                inner &= np.roll(area, step, axis)
        large[area & ~inner] = (255, 255, 255)
    return large.clip(0, 255).astype(np.uint8)


def kept_tokens(
    rows: list[dict], outcomes: dict, data, image_processor, path: Path, one_image: bool = False, samples: int = 5
) -> bool:
    """One line of pictures per row that cuts tokens: what the last cut left, the asked objects framed in white. Images are
    shown as the model reads them, padded or cropped, so that patches lie where they belong.

    False where no row kept a record of its tokens on one grid, or no sample has one image. Rows that choose at random,
    and those of later sections, are left out.
    """
    drawn = [row for row in rows if row.get("drawable", True) and any(o["kept"] for o in outcomes[row["label"]])]
    if not drawn:
        return False
    drawn = [row for row in drawn if "random" not in row["label"]] or drawn
    drawn = [row for row in drawn if row["section"] == drawn[0]["section"]][:10]
    patches = rows[0]["tokens"][0]
    # One sample of each family in turn, each about another image; those that failed in some row are left out.
    count = min(samples, len(data))
    places = [min(i * (len(data) // count) + i, len(data) - 1) for i in range(count)]
    if one_image:  # the questions about the first image that has several
        first = [read(data, i) for i in range(min(len(data), 50))]
        images = [i if isinstance(each, Failed) else each.get("image_id", i) for i, each in enumerate(first)]
        shared = max(images, key=images.count)
        places = [i for i, image in enumerate(images) if image == shared][:samples]
    by_row = [{outcome["id"]: outcome for outcome in outcomes[row["label"]]} for row in drawn]
    shown = [sample for sample in (read(data, place) for place in places) if not isinstance(sample, Failed)]
    shown = [s for s in shown if len(pictures(s)) == 1 and all(s["id"] in by_id for by_id in by_row)]
    count = len(shown)
    if not shown:
        return False
    figure, grid = plt.subplots(
        len(drawn), count, figsize=(2.1 * count, 2.25 * len(drawn) + 0.5), squeeze=False, layout="constrained"
    )
    for line, row, by_id in zip(grid, drawn, by_row, strict=True):
        for column, (axes, sample) in enumerate(zip(line, shown, strict=True)):
            outcome = by_id[sample["id"]]
            image = np.asarray(as_seen(image_processor, *pictures(sample)))
            axes.imshow(overlay(image, outcome["kept"], patches, sample["patches"].numpy()))
            axes.set(xticks=[], yticks=[])
            colour = "black" if outcome["correct"] is None else "tab:green" if outcome["correct"] else "tab:red"
            axes.set_xlabel(plain(outcome["prediction"]), fontsize=7, color=colour, labelpad=2)
            if row is drawn[0]:
                axes.set_title(plain(sample["question"], 34), fontsize=6.5)
            if column == 0:
                axes.set_ylabel(plain(row["label"]), fontsize=7)
    save(figure, path, dpi=80)
    return True


def save(figure, path: Path, dpi: int) -> None:
    """Write a figure as a PNG of 256 colours: a third of the size, and no different to the eye."""
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of any script: matplotlib draws a box in its place
        figure.savefig(drawn, dpi=dpi)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def plain(text: str, width: int = 40) -> str:
    """Text from data as text: no TeX, no control character, no line longer than `width`."""
    return shortened(one_line(text), width).replace("$", r"\$")
