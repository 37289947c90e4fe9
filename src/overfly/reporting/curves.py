"""What log.jsonl holds, as curves: losses, learning rate, validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfly.core.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[str, list[tuple[int, float]]]
"""For each name, its points (step, value)."""

LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colors that the color-blind can tell apart (Okabe and Ito, 2008)."""


def curves(rows: Iterable[Mapping[str, Any]], path: Path, *, smoothing: float = 0.05) -> Path:
    """Draw losses, learning rate and validation over the steps, one below the other, into one PNG.

    A row without ``event`` is a step: ``lr`` is the learning rate, every other number a loss. A row with ``event`` is
    something measured: its numbers are points; a text under ``domain`` or ``split`` becomes part of their name.

    Args:
        rows: lines of log.jsonl, such as ``{"step": 40, "source": 0.78, "lr": 0.0098}``.
        path: the file to write; its folder is made.
        smoothing: share of a line's points that each point of the smoothed one is the mean of, 0 to 1; the plain line
            stays in the background.

    Returns:
        The path.

    Raises:
        RunError: log.jsonl holds no figures yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses, rates, measured = collected(rows)
    if all(len(points) < 2 for points in measured.values()) and losses:  # a single score is no curve
        measured = {}
    parts = [part for part in (losses, rates, measured) if part]
    if not parts:
        raise RunError("log.jsonl holds no figures yet, so there is nothing to draw; train some steps first")
    heights = [1.0 if part is rates else 2.0 for part in parts]
    figure = Figure(figsize=(8, 0.8 + 1.5 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(parts), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, part in zip(grid[:, 0], parts, strict=True):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if part is losses:
            _losses(axes, losses, smoothing)
        elif part is rates:
            axes.plot(*zip(*rates["lr"], strict=True), color="#444444", linewidth=1.2)
            axes.set_ylabel("learning rate")
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        else:
            _measured(axes, measured)
    grid[-1, 0].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def collected(rows: Iterable[Mapping[str, Any]]) -> tuple[Points, Points, Points]:
    """Losses, learning rates, and what was measured, each as points by name; numbers that are not finite are left out.

    Where a step stands twice, the later row counts.
    """
    found: tuple[dict[str, dict[int, float]], ...] = ({}, {}, {})
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int):
            continue
        where = " ".join(str(row[key]) for key in ("domain", "split") if isinstance(row.get(key), str))
        for key, value in row.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                kind = 2 if "event" in row else 1 if key == "lr" else 0
                found[kind].setdefault(f"{where} {key}".strip(), {})[step] = float(value)
    losses, rates, measured = ({key: sorted(part[key].items()) for key in part} for part in found)
    return losses, rates, measured


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of ``width`` neighbors around each value; towards the ends fewer, as many on either side."""
    half = width // 2
    found = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        part = values[index - reach : index + reach + 1]
        found.append(sum(part) / len(part))
    return found


def _losses(axes: Axes, losses: Points, smoothing: float) -> None:
    for index, (name, points) in enumerate(losses.items()):
        color = LINES[index % len(LINES)]
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values, round(smoothing * len(values))), color=color, linewidth=1.6, label=name)
    lowest = min(value for points in losses.values() for _, value in points)
    highest = max(value for points in losses.values() for _, value in points)
    if lowest > 0 and highest / lowest > 100:
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=9, ncols=3)


def _measured(axes: Axes, measured: Points) -> None:
    for index, (name, points) in enumerate(measured.items()):
        color = LINES[index % len(LINES)]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, linewidth=1.2, label=name)
    axes.set_ylabel("score")
    axes.legend(frameon=False, fontsize=9, ncols=2)


__all__ = ["collected", "curves", "smoothed"]
