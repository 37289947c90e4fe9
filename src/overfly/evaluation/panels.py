"""Figures as PNG: image | label | prediction, several networks side by side, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from overfly.core.classes import Classes
from overfly.core.records import IGNORE, Array, UInt8
from overfly.evaluation.confusion import Confusion
from overfly.evaluation.score import Sample

TEXT_COLOR, HEADING_COLOR, LINE_COLOR, BACKGROUND = (30, 30, 30), (95, 95, 95), (150, 150, 150), (255, 255, 255)
MARGIN = 12
STRIPE_COLORS = ((70, 70, 70), (0, 0, 0))
"""The two grays of the stripes that mark pixels without a label."""


class Tile(NamedTuple):
    """An image (H, W, 3) of a row; ``striped`` (H, W) marks pixels without a label."""

    image: UInt8
    striped: UInt8 | None = None
    nearest: bool = False
    """Resize by nearest neighbor, as for class colors."""


class FigureRow(NamedTuple):
    """A row of a figure: its heading, and a tile or None per column."""

    heading: str
    tiles: list[Tile | None]


def to_rgb(image: Array) -> UInt8:
    """Convert an image of any sensor to 8-bit RGB (H, W, 3): its first three bands, or the first if there are fewer.

    Eight-bit bands stay as they are. Others are stretched from their 2nd to their 98th percentile; values that are not
    finite are left out.

    Args:
        image: (H, W, C) or (H, W), of any number type.
    """
    cube = image[..., None] if image.ndim == 2 else image
    shown = cube[..., [0, 1, 2] if cube.shape[-1] >= 3 else [0, 0, 0]]
    if shown.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    values = shown.astype(np.float32)
    values[~np.isfinite(values)] = np.nan
    if np.isnan(values).all():
        return np.zeros(values.shape, np.uint8)
    low, high = np.nanpercentile(values, (2, 98), axis=(0, 1))
    stretched = np.nan_to_num((values - low) / np.maximum(high - low, 1e-6))
    rounded: UInt8 = (stretched.clip(0, 1) * 255).round().astype(np.uint8)
    return rounded


def samples_figure(samples: Iterable[Sample], classes: Classes, path: Path, side: int = 320) -> Path:
    """Draw image | label | prediction of samples, one per row, with a legend, into a PNG; return its path.

    Pixels without a label are striped. Without any labels, that column is left out.

    Args:
        samples: the samples, such as `overfly.evaluation.score.Samples`.
        classes: names and colors.
        path: the file to write; its folder is created.
        side: longest side of each image in the figure, in pixels.
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

    Args:
        rows: heading, and samples of one image by network. Image and label are those of the first network; without any
            labels, that column is left out.
        classes: see `samples_figure`.
        path: see `samples_figure`.
        side: see `samples_figure`.
    """
    rows = list(rows)
    networks = list(dict.fromkeys(network for _, samples in rows for network in samples))
    labeled = any(sample.label is not None for _, samples in rows for sample in samples.values())
    tiled = []
    for heading, samples in rows:
        first = next(iter(samples.values()))
        tiles: list[Tile | None] = [Tile(to_rgb(first.image))]
        tiles += [_paint_label(first.label, classes)] if labeled else []
        tiles += [
            _paint_label(samples[network].prediction if network in samples else None, classes) for network in networks
        ]
        tiled.append(FigureRow(heading, tiles))
    return _draw_sheet(tiled, ["image", *(["label"] if labeled else []), *networks], classes, path, side)


def confusion_figure(confusion: Confusion | Sequence[Sequence[int]], classes: Classes, path: Path) -> Path:
    """Draw a confusion matrix, each row in percent of the pixels with this label, into a PNG; return its path.

    Args:
        confusion: counts (K, K), rows the labels, columns the predictions.
        classes: names of the K classes.
        path: the file to write; its folder is created.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.asarray(confusion.counts.tolist() if isinstance(confusion, Confusion) else confusion, dtype=np.float64)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    number = len(counts)
    figure = Figure(figsize=(2.4 + 0.62 * number, 2.0 + 0.62 * number), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [
        f"{name}\n{_format_share(total / max(totals.sum(), 1))} of pixels"
        for name, total in zip(classes.names, totals[:, 0], strict=True)
    ]
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _format_share(value: float) -> str:
    return "0%" if value == 0 else "<1%" if value < 0.01 else f"{value:.0%}"


def _paint_label(ids: UInt8 | None, classes: Classes) -> Tile | None:
    if ids is None:
        return None
    striped: UInt8 = (ids == IGNORE).astype(np.uint8)
    return Tile(classes.paint(ids), striped if striped.any() else None, nearest=True)


def _draw_sheet(rows: Sequence[FigureRow], columns: Sequence[str], classes: Classes, path: Path, side: int) -> Path:
    """Draw rows of tiles, titles and the legend into a PNG."""
    font, small = load_font(15), load_font(13)
    fitted = [(row, [None if tile is None else _resize_tile(tile, side) for tile in row.tiles]) for row in rows]
    heights = [max((image.height for image in images if image), default=side) for _, images in fitted]
    width = MARGIN + len(columns) * (side + MARGIN)
    striped = any(tile is not None and tile.striped is not None for row in rows for tile in row.tiles)
    legend = _legend(classes, width, small, striped)
    height = 34 + sum(heights) + 32 * len(rows) + legend.height + MARGIN
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, column in enumerate(columns):
        draw.text((MARGIN + index * (side + MARGIN), 10), column, TEXT_COLOR, font)
    top = 34
    for (row, images), row_height in zip(fitted, heights, strict=True):
        draw.text((MARGIN, top + 4), row.heading, HEADING_COLOR, small)
        top += 24
        for index, image in enumerate(images):
            left = MARGIN + index * (side + MARGIN)
            if image is None:
                draw.text((left, top + row_height // 2), "none", LINE_COLOR, small)
                continue
            sheet.paste(image, (left, top))
            draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline=LINE_COLOR)
        top += row_height + 8
    sheet.paste(legend, (0, top + 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _resize_tile(tile: Tile, side: int) -> Image.Image:
    """The tile, resized to ``side`` pixels on its longest side, with stripes on top."""
    height, width = tile.image.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resampling = Image.Resampling.NEAREST if tile.nearest or scale > 2 else Image.Resampling.LANCZOS
    image = Image.fromarray(tile.image).resize(size, resampling)
    if tile.striped is not None:
        mask = Image.fromarray(tile.striped * np.uint8(255)).resize(size, Image.Resampling.NEAREST)
        image.paste(_stripes(size), (0, 0), mask)
    return image


def _stripes(size: tuple[int, int]) -> Image.Image:
    across, down = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    stripes: UInt8 = np.asarray(STRIPE_COLORS, np.uint8)[((across + down) // 4) % 2]
    return Image.fromarray(stripes)


def _legend(classes: Classes, width: int, font: ImageFont.FreeTypeFont, striped: bool) -> Image.Image:
    """Color swatches with class names, wrapped to the width."""
    names = [*classes.names, *(["no label"] if striped else [])]
    positions, left, top = [], MARGIN, 8
    for name in names:
        name_width = 22 + round(font.getlength(name)) + 18
        if left + name_width > width and left > MARGIN:
            left, top = MARGIN, top + 24
        positions.append((left, top))
        left += name_width
    image = Image.new("RGB", (width, top + 28), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for index, (name, (left, top)) in enumerate(zip(names, positions, strict=True)):
        if index < len(classes.names):
            image.paste(classes.colors[index], (left, top, left + 16, top + 16))
        else:
            image.paste(_stripes((16, 16)), (left, top))
        draw.rectangle((left, top, left + 16, top + 16), outline=LINE_COLOR)
        draw.text((left + 22, top), name, TEXT_COLOR, font)
    return image


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which comes with matplotlib and covers many languages."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
