"""Plot of accuracy against cost, and pictures of the kept tokens."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from ivtp.data.batches import images_of
from ivtp.data.failures import Failed, read
from ivtp.data.outcomes import Outcome
from ivtp.evaluation.task_metrics import principal
from ivtp.report.viewer import as_seen
from ivtp.results import Result, finite
from ivtp.text import one_line, printable, shortened

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PALETTE = (
    *("#4c78d0", "#e0812f", "#3f9d63", "#c8505c", "#8a67c1"),
    *("#a0785a", "#d070ae", "#6f7a86", "#a9a233", "#35a3b3"),
    *("#2a4272", "#7b471a", "#235636", "#6e2c33", "#4c396a"),  # the same, darker
    *("#584232", "#723e60", "#3d434a", "#5d591c", "#1d5a62"),
    *("#9db5e5", "#eeba8d", "#95c9a9", "#e19fa5", "#bfabdd"),  # and lighter
    *("#cbb5a4", "#e5b0d2", "#b0b6bc", "#d0cc8f", "#90ccd5"),
)
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")


def accuracy_cost(results: list[Result], heads: Sequence[str] = (), narrow: bool = False) -> dict:
    """Accuracy, or the score of a benchmark task, with its standard error against GFLOPs, as a Vega-Lite specification.

    One line per series and section, from its cheapest row to its dearest. The page shows the specification, a PNG is
    rendered from it.

    heads   headings of the cells `c0`, `c1`, … that the page adds to every point, for the tooltip
    narrow  for a screen of less than 640 pixels
    """
    series = list(dict.fromkeys(result.series or result.label for result in results))
    sections = list(dict.fromkeys(result.section or "–" for result in results))
    legend = {"symbolOpacity": 1, "orient": "right", "columns": math.ceil(len(series) / 18)}
    legend |= {"orient": "bottom", "columns": 1} if narrow else {}
    color = {"field": "series", "type": "nominal", "title": None, "legend": legend}
    color["scale"] = {"domain": series, "range": [PALETTE[i % len(PALETTE)] for i in range(len(series))]}
    shape = {"field": "section", "type": "nominal", "title": None, "legend": legend}
    shape["scale"] = {"domain": sections, "range": SHAPES}
    x, mean, low = ({"field": name, "type": "quantitative"} for name in ("gflops", "mean", "low"))
    x |= {"title": "GFLOPs per question, prefill", "scale": {"zero": False, "nice": True, "padding": 14}}
    mean |= {"title": measure(results), "scale": {"zero": False, "nice": True}}
    pick = {"name": "pick", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}
    zoom = {"name": "zoom", "select": {"type": "interval", "zoom": "wheel![event.shiftKey]"}, "bind": "scales"}
    # Vega-Lite writes titles of a tooltip into an expression and escapes nothing but quotes.
    literals = [printable(head).replace("\\", "\\\\").replace("\n", " ") for head in heads]
    tooltip = [{"field": f"c{i}", "type": "nominal", "title": head} for i, head in enumerate(literals)]
    line, error, point = (
        {"opacity": {"condition": {"param": "pick", "value": opacity}, "value": 0.08}, "y": y}
        for opacity, y in ((0.45, mean), (0.6, low), (1, mean))
    )
    line |= {"detail": {"field": "section"}, "order": {"field": "gflops"}}
    error |= {"y2": {"field": "high"}}
    point |= {"shape": shape if len(sections) > 1 else {"value": "circle"}, "tooltip": tooltip}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"name": "points"},
        "datasets": {"points": points(results)},
        "width": "container",
        "height": 300 if narrow else 400,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "encoding": {"x": x, "color": color},
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": line,
                "params": [pick, *([] if narrow else [zoom])],
            },
            {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": error},
            {"mark": {"type": "point", "filled": True, "size": 90 if narrow else 75}, "encoding": point},
        ],
    }


def points(results: list[Result]) -> list[dict]:
    """Points of the plot, one per row that was scored."""
    return [
        {
            "row": row,
            "label": result.label,
            "series": result.series or result.label,
            "section": result.section or "–",
            "gflops": 1e3 * result.tflops["total"],
            **dict(zip(("mean", "low", "high"), bounds(principal(result.metrics), scale(result)), strict=True)),
        }
        for row, result in enumerate(results)
        if principal(result.metrics)["mean"] is not None
    ]


def scale(result: Result) -> int:
    """Factor from the principal metric to the axis: accuracies are shown in percent."""
    return 1 if "score" in result.metrics else 100


def measure(results: list[Result]) -> str:
    """Name of the axis of the principal metric."""
    score = results[0].metrics.get("score")
    return score["name"] if score else "accuracy, %"


def bounds(metric: dict, scale: int = 100) -> list[float | None]:
    """Mean, low and high: one standard error to each side, or the standard deviation between seeds."""
    mean, error = metric["mean"], metric.get("se") if metric.get("sd") is None else metric["sd"]
    if mean is None:
        return [None, None, None]
    error = 0 if error is None or error != error else error
    return [scale * x for x in (mean, mean - error, mean + error)]


def save_spec(spec: dict, title: str, path: Path) -> None:
    """Render a Vega-Lite specification as a PNG."""
    import vl_convert

    font = "DejaVu Sans"
    config = {"font": font, "background": "white", "view": {"stroke": None}, "axis": {"titleFontWeight": 400}}
    config["legend"] = {"labelLimit": 320}
    spec = with_texts(finite(spec), lambda text: shortened(one_line(text), 120)) | {"config": config}
    spec |= {"title": plain(title), "width": 860}
    save_png(vl_convert.vegalite_to_png(spec, scale=1.5), path)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Change all texts of a JSON value, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {with_texts(key, change): with_texts(each, change) for key, each in value.items()}
    return [with_texts(each, change) for each in value] if isinstance(value, (list, tuple)) else value


def overlay(image: np.ndarray, kept: list[int], patches: int, target: np.ndarray | None = None) -> np.ndarray:
    """Image with all but the kept patches darkened, and the target patches framed; RGB uint8.

    image  as the model reads it (see `viewer.as_seen`): one grid of patches covers all of it
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
    if target is not None and target.any():
        area = np.kron(target.reshape(side, side), np.ones((cell, cell))).astype(bool)
        inner = area.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                inner &= np.roll(area, step, axis)
        large[area & ~inner] = (255, 255, 255)
    return large.clip(0, 255).astype(np.uint8)


def kept_patches(image_processor, sample: dict, outcome: Outcome, patches: int) -> np.ndarray:
    """Image of a sample as the model reads it, with all but the kept patches darkened."""
    image = np.asarray(as_seen(image_processor, *images_of(sample)))
    return overlay(image, outcome["kept"], patches, sample["patches"].numpy())


def kept_tokens(
    results: list[Result],
    outcomes: dict[str, list[Outcome]],
    data,
    image_processor,
    path: Path,
    one_image: bool = False,
    samples: int = 5,
) -> bool:
    """Draw the tokens that the last cut left: a line of pictures per row that cuts tokens, target patches framed in white.

    Images are shown as the model reads them, padded or cropped, so that patches lie where they belong. Rows that choose
    at random, and those of later sections, are left out. False where no row recorded its tokens on one grid, or no
    sample has one image.
    """
    drawn = [r for r in results if r.drawable and any(o["kept"] for o in outcomes[r.label])]
    if not drawn:
        return False
    drawn = [result for result in drawn if "random" not in result.label] or drawn
    drawn = [result for result in drawn if result.section == drawn[0].section][:10]
    by_row = [{outcome["id"]: outcome for outcome in outcomes[result.label]} for result in drawn]
    indices = _of_one_image(data, samples) if one_image else _of_each_family(data, samples)
    shown = [sample for sample in (read(data, index) for index in indices) if not isinstance(sample, Failed)]
    shown = [s for s in shown if len(images_of(s)) == 1 and all(s["id"] in by_id for by_id in by_row)]
    if not shown:
        return False
    figure, grid = plt.subplots(
        len(drawn),
        len(shown),
        figsize=(2.1 * len(shown), 2.25 * len(drawn) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for line, result, by_id in zip(grid, drawn, by_row, strict=True):
        line[0].set_ylabel(plain(result.label), fontsize=7)
        for axes, sample in zip(line, shown, strict=True):
            outcome = by_id[sample["id"]]
            axes.imshow(kept_patches(image_processor, sample, outcome, results[0].tokens[0]))
            axes.set(xticks=[], yticks=[])
            colour = "black" if outcome["correct"] is None else "tab:green" if outcome["correct"] else "tab:red"
            axes.set_xlabel(plain(outcome["prediction"]), fontsize=7, color=colour, labelpad=2)
    for axes, sample in zip(grid[0], shown, strict=True):
        axes.set_title(plain(sample["question"], 34), fontsize=6.5)
    save(figure, path, dpi=80)
    return True


def _of_each_family(data, samples: int) -> list[int]:
    """Indices of one sample of each family in turn, each about another image."""
    count = min(samples, len(data))
    return [min(i * (len(data) // count) + i, len(data) - 1) for i in range(count)]


def _of_one_image(data, samples: int) -> list[int]:
    """Indices of the questions about the first image that has the most."""
    first = [read(data, i) for i in range(min(len(data), 50))]
    images = [i if isinstance(each, Failed) else each.get("image_id", i) for i, each in enumerate(first)]
    shared = max(images, key=images.count)
    return [i for i, image in enumerate(images) if image == shared][:samples]


def save(figure, path: Path, dpi: int) -> None:
    """Write a figure of matplotlib as a PNG."""
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of any script: matplotlib draws a box in its place
        figure.savefig(drawn, dpi=dpi)
    plt.close(figure)
    save_png(drawn.getvalue(), path)


def save_png(content: bytes, path: Path) -> None:
    """Write a PNG in 256 colours: a third of the size, and no different to the eye."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def plain(text: str, width: int = 40) -> str:
    """Text from data as text: no TeX, no control character, no line longer than `width`."""
    return shortened(one_line(text), width).replace("$", r"\$")
