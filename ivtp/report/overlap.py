"""Agreement of methods on the kept tokens: mean Jaccard overlap between rows of the same final count."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ivtp.data.outcomes import Outcome
from ivtp.report.tables import Table
from ivtp.results import Result


@dataclass(frozen=True)
class Overlap:
    """Overlaps among rows that end with the same number of tokens: `mean[i, j]` is that of `names[i]` and `names[j]`."""

    tokens: int
    patches: int
    names: list[str]
    mean: np.ndarray

    @property
    def chance(self) -> float:
        """Approximate overlap of two independent uniform choices: the ratio of the expected counts."""
        return self.tokens / (2 * self.patches - self.tokens)


def jaccard(kept: list[list[list[int]]], patches: int) -> np.ndarray:
    """Mean over samples of |A ∩ B| / |A ∪ B|, between rows; kept[row][sample] lists patches. Two empty sets agree."""
    marks = np.zeros((len(kept), len(kept[0]), patches), np.float32)
    for row, samples in enumerate(kept):
        for sample, indices in enumerate(samples):
            marks[row, sample, indices] = 1
    marks = marks.transpose(1, 0, 2)
    both = marks @ marks.transpose(0, 2, 1)
    count = marks.sum(2)
    either = count[:, :, None] + count[:, None] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0).mean(0, dtype=np.float64)


def overlaps(results: list[Result], outcomes: dict[str, list[Outcome]], section: str) -> Iterator[Overlap]:
    """Overlaps among the rows of a section with recorded tokens, by final count, fewest tokens first."""
    groups: dict[int, list[Result]] = {}
    for result in results:
        recorded = outcomes[result.label]
        if result.section == section and recorded and all(outcome["kept"] is not None for outcome in recorded):
            groups.setdefault(result.tokens[-1], []).append(result)
    for tokens, group in sorted(groups.items()):
        by_id = [{outcome["id"]: outcome["kept"] for outcome in outcomes[result.label]} for result in group]
        common = [name for name in by_id[0] if all(name in kept for kept in by_id)]
        if len(group) < 2 or not common:
            continue
        names = [result.series or result.label for result in group]
        if len(set(names)) < len(names):
            names = [result.label for result in group]
        patches = results[0].tokens[0]
        yield Overlap(tokens, patches, names, jaccard([[kept[name] for name in common] for kept in by_id], patches))


def table(overlap: Overlap) -> Table:
    """Table of overlaps in percent, with the two most similar rows of each."""
    lines = []
    for i, (name, values) in enumerate(zip(overlap.names, overlap.mean, strict=True)):
        nearest = [j for j in np.argsort(-values, kind="stable") if j != i][:2]
        cells = [f"{100 * value:.0f}" if j != i else "–" for j, value in enumerate(values)]
        lines.append([name, ", ".join(overlap.names[j] for j in nearest), *cells])
    note = (
        "Mean over questions of |A ∩ B| / |A ∪ B|, in %, of the patches that are left at the end; a merged token counts as "
        f"where it stands. Two choices by chance: about {100 * overlap.chance:.0f}. Of several seeds the first is shown."
    )
    title = f"Overlap of kept tokens, {overlap.tokens} of {overlap.patches}"
    return Table(title, ["row", "most like", *overlap.names], lines, note)


def heat_map(groups: list[Overlap], path: Path) -> bool:
    """Draw a panel per token count, methods that agree beside each other; False, and no picture, without overlaps."""
    if not groups:
        return False
    from ivtp.report.plots import plain, plt, save

    size = max(3.2, 0.24 * max(len(overlap.names) for overlap in groups))
    figure, line = plt.subplots(
        1, len(groups), figsize=(len(groups) * (size + 1), size + 1), squeeze=False, layout="constrained"
    )
    for axes, overlap in zip(line[0], groups, strict=True):
        order = together(overlap.mean)
        names = [plain(overlap.names[i]) for i in order]
        image = axes.imshow(100 * overlap.mean[np.ix_(order, order)], vmin=0, vmax=100, cmap="viridis")
        axes.set_title(
            f"{overlap.tokens} of {overlap.patches} tokens (chance: about {100 * overlap.chance:.0f} %)", fontsize=9
        )
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(image, ax=line[0], label="overlap of kept tokens (Jaccard, %)", shrink=0.8)
    save(figure, path, dpi=80)
    return True


def together(mean: np.ndarray) -> list[int]:
    """Order in which neighbours agree: the leaves of average linkage."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    above = np.triu_indices(len(mean), 1)
    return leaves_list(linkage(1 - mean[above], "average", optimal_ordering=True)).tolist()
