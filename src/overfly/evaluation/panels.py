"""Figures as PNG: image | label | prediction, several networks side by side, and the confusion matrix."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from overfly.core.atomic_files import atomic_write
from overfly.core.classes import Classes
from overfly.core.records import IGNORE, Array, UInt8
from overfly.data.domain import SPLITS
from overfly.data.raster import Raster
from overfly.evaluation.score import Sample
from overfly.evaluation.scores import Confusion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
SPLIT_COLORS = ((0, 80, 255), (255, 0, 190), (255, 255, 0))
"""Colors of train, val and test, unlike those of `Classes`."""
STRIPE_COLORS = ((70, 70, 70), (0, 0, 0))
"""The two grays of the stripes that mark pixels without a label."""
ValueRange = tuple[Array, Array]
"""Values (C,) of the bands that are shown as black and as white."""


def value_range(image: Array) -> ValueRange:
    """Return the 2nd and 98th percentile of each band of an image (H, W, C), without values that are not finite."""
    values = np.where(np.isfinite(image), image, np.nan).astype(np.float64)
    if np.isnan(values).all():
        return np.zeros(values.shape[-1]), np.ones(values.shape[-1])
    low, high = np.nanpercentile(values, (2, 98), axis=(0, 1))
    return low, np.maximum(high, low + 1e-6)


def to_rgb(image: Array, limits: ValueRange | None = None) -> UInt8:
    """Convert an image (H, W, C) or (H, W) of any sensor to 8-bit RGB (H, W, 3): its first three bands, or the first.

    Eight-bit bands stay as they are. Others are stretched between ``limits``, default: their `value_range`; values that
    are not finite are 0.
    """
    cube = image[..., None] if image.ndim == 2 else image
    shown = cube[..., [0, 1, 2] if cube.shape[-1] >= 3 else [0, 0, 0]]
    if shown.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    low, high = limits or value_range(shown)
    stretched = np.where(np.isfinite(shown), (shown - low) / (high - low), 0)
    return np.asarray((stretched.clip(0, 1) * 255).round(), np.uint8)


def samples_figure(samples: Iterable[Sample], classes: Classes, path: Path, side: int = 320) -> Path:
    """Draw image | label | prediction of samples, one per row, with a legend, into a PNG; return its path.

    Pixels without a label are striped. Without any labels, that column is left out.
    ``side`` is the longest side of each image in the figure, about, in pixels. The file's folder is created.
    """
    rows = []
    for sample in samples:
        accuracy = "" if sample.accuracy is None else f"   pixel accuracy {sample.accuracy:.0%}"
        rows.append((sample.name + accuracy, {"prediction": sample}))
    return comparison_figure(rows, classes, path, side)


def comparison_figure(
    rows: Iterable[tuple[str, Mapping[str, Sample]]], classes: Classes, path: Path, side: int = 320
) -> Path:
    """Draw image | label | predictions of several networks into a PNG, and return its path.

    ``rows`` are a heading, and samples of one image by network. Image and label are those of the first network; without
    any labels, that column is left out. The other arguments are those of `samples_figure`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = list(rows)
    networks = list(dict.fromkeys(network for _, samples in rows for network in samples))
    labeled = any(sample.label is not None for _, samples in rows for sample in samples.values())
    titles = ["image", *(["label"] if labeled else []), *networks]
    firsts = [next(iter(samples.values())) for _, samples in rows]
    heights = [side * sample.prediction.shape[0] / max(sample.prediction.shape) for sample in firsts]
    width = len(titles) * (side + 10)
    columns = max(1, width // (50 + 9 * max(map(len, classes.names))))
    height = sum(heights) + 30 * len(rows) + 30 + 24 * (len(classes) // columns + 1)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), len(titles), squeeze=False, gridspec_kw={"height_ratios": heights})
    dark, black = ("#{:02x}{:02x}{:02x}".format(*color) for color in STRIPE_COLORS)
    labels: list[UInt8] = []
    for line, first, (heading, samples) in zip(grid, firsts, rows, strict=True):
        ids = [first.label] * labeled + [samples[name].prediction if name in samples else None for name in networks]
        labels += [label for label in ids if label is not None]
        painted = [
            None if label is None else np.dstack([classes.paint(label), np.where(label == IGNORE, 0, 255)])
            for label in ids
        ]
        line[0].set_xlabel(heading, loc="left", fontsize=9)
        for axes, image in zip(line, [to_rgb(first.image), *painted], strict=True):
            axes.set(xticks=[], yticks=[], facecolor=dark if image is not None else "white")
            axes.patch.set(hatch="////" if image is not None else None, edgecolor=black)
            if image is None:
                axes.text(0.5, 0.5, "none", ha="center", va="center", color="gray")
            else:
                axes.imshow(image, interpolation="nearest" if image.shape[2] == 4 else "auto")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    colors = dict(zip(classes.names, np.divide(classes.colors, 255), strict=True))
    legend = [Patch(fc=color, ec="gray", label=name) for name, color in colors.items()]
    if any((label == IGNORE).any() for label in labels):
        legend.append(Patch(fc=dark, ec=black, hatch="////", label="no label"))
    figure.legend(handles=legend, loc="outside lower left", ncols=columns, frameon=False)
    save_figure(figure, path)
    return path


def splits_figure(domain: Raster, path: Path, side: int = 640, limit: int = 6) -> Path:
    """Draw the splits of up to ``limit`` rasters over their images, with their labels, into a PNG; return its path."""
    names = tuple(f"split {name}" if name in domain.classes.names else name for name in SPLITS)
    shown = Classes(names=names + domain.classes.names, colors=SPLIT_COLORS + domain.classes.colors)
    rows = []
    for grid, assigned in domain.assignments()[:limit]:
        image, splits, label = domain.overview(grid, assigned, side)
        tinted = (0.6 * to_rgb(image) + 0.4 * shown.paint(splits)).astype(np.uint8)
        ids = None if label is None else np.where(label == IGNORE, label, label + len(SPLITS)).astype(np.uint8)
        rows.append((f"{grid.source} ({grid.width}×{grid.height})", {"splits": Sample("", tinted, splits, ids)}))
    return comparison_figure(rows, shown, path, side)


def confusion_figure(confusion: Confusion | Sequence[Sequence[int]], classes: Classes, path: Path) -> Path:
    """Draw a confusion matrix, each row in percent of the pixels with this label, into a PNG; return its path.

    ``confusion`` holds counts (K, K): rows are the labels, columns the predictions. The file's folder is created.
    """
    from matplotlib.figure import Figure

    counts = np.asarray(confusion.counts.tolist() if isinstance(confusion, Confusion) else confusion, dtype=np.float64)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    number = len(counts)
    figure = Figure(figsize=(2.4 + 0.62 * number, 2.0 + 0.62 * number), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    parts = (totals[:, 0] / max(totals.sum(), 1)).tolist()
    parts = ["<1%" if 0 < part < 0.01 else f"{part:.0%}" for part in parts]
    names = [f"{name}\n{part} of pixels" for name, part in zip(classes.names, parts, strict=True)]
    axes.set_xticks(range(number), classes.names, rotation=40, ha="left", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(number), names, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    for row in range(number):
        for column in range(number):
            text = f"{shares[row, column] * 100:.0f}" if totals[row, 0] else "–"
            dark = shares[row, column] > 0.55
            axes.text(
                column, row, text, ha="center", va="center", fontsize=10, color="white" if dark else "#222222",
                fontweight="bold" if row == column else "normal",
            )  # fmt: skip
    axes.set_ylabel("label")
    axes.set_title("prediction, in % of the label's pixels", fontsize=10)
    save_figure(figure, path, 130)
    return path


def save_figure(figure: "Figure", target: Path | IO[Any], dpi: int = DPI, **settings: Any) -> None:
    """Write a figure to a file atomically, whose folder is created, or to an open file, with all text as it is."""
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as part, part.open("wb") as file:
            save_figure(figure, file, dpi, format=target.suffix[1:])
        return
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "overfly"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(target, dpi=dpi, **settings)
