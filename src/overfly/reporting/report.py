"""Render a report as a self-contained HTML file of at most 5 MB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from overfly.adaptation.selection import COLUMNS, LEGEND, Selection
from overfly.benchmarking import SeedStatistics
from overfly.core.classes import Classes
from overfly.core.errors import OverflyError
from overfly.core.progress import percent
from overfly.core.records import UInt8
from overfly.evaluation.speed import Speed
from overfly.reporting import figures
from overfly.reporting.samples import SampleSet

MAX_BYTES = 5_000_000
SIDES = (320, 240, 180, 120, 80)
"""Longest sides of images in pixels; the first one that fits into `MAX_BYTES` is used."""
TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class ConfusionTable:
    """Counts of pixels (K, K) over all seeds, rows the labels, columns the predictions; ``open``: shown expanded."""

    title: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]
    open: bool = False

    @property
    def rows(self) -> list[tuple[str, float, list[float | None]]]:
        """Name and pixel share of each label, and the shares of its pixels predicted as each class."""
        total = max(sum(map(sum, self.counts)), 1)
        result = []
        for name, row in zip(self.names, self.counts, strict=True):
            labeled = sum(row)
            result.append((name, labeled / total, [count / labeled if labeled else None for count in row]))
        return result


@dataclass(frozen=True)
class RecipeResults:
    """A recipe with the results of its seeds.

    Attributes:
        name: unique in the report.
        model: name of the model.
        about: method, source, length, criterion, and more, as text.
        seeds: seeds of the runs.
        miou: mIoU by domain title.
        classes: IoU of each class by domain title.
        gap: closed share of the gap between source only and oracle.
        labels_opened: how often target labels were read, and how many; empty for never.
        confusions: one per domain.
        losses: training curves of the first seed.
        metrics: validation curves of the first seed.
        runs: names of the run folders.
        recipe: YAML of the first seed's recipe.
        machine: machine of the first seed.
    """

    name: str
    model: str
    about: Mapping[str, str]
    seeds: Sequence[int]
    miou: Mapping[str, SeedStatistics]
    classes: Mapping[str, Mapping[str, SeedStatistics]]
    gap: SeedStatistics | None
    labels_opened: str
    confusions: Sequence[ConfusionTable]
    losses: figures.Points
    metrics: figures.Points
    runs: Sequence[str]
    recipe: str
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """The content of a report."""

    title: str
    date: str
    split: str
    entries: Sequence[RecipeResults]
    selections: Mapping[str, Selection] = field(default_factory=dict)
    """Selections by name of the comparison."""
    galleries: Sequence[SampleSet] = ()
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    own_colors: bool = False

    @property
    def domains(self) -> list[str]:
        """Titles of all scored domains."""
        return list(dict.fromkeys(domain for entry in self.entries for domain in entry.miou))

    @property
    def gap_chart(self) -> Markup | None:
        """Chart of the gap closed; None if no entry has it."""
        result = [
            figures.Bar(entry.name, entry.gap.mean, entry.gap.deviation, entry.gap.values)
            for entry in self.entries
            if entry.gap and entry.gap.mean is not None
        ]
        title = "Share of the gap between source only and oracle that was closed"
        return figures.bars(result, title) if result else None

    @property
    def class_charts(self) -> list[tuple[str, Markup]]:
        """Charts of the IoU of each class by domain, each with at most as many entries as colors."""
        charts = []
        for domain in self.domains:
            for names in dict.fromkeys(
                tuple(entry.classes[domain]) for entry in self.entries if domain in entry.classes
            ):
                same = [entry for entry in self.entries if tuple(entry.classes.get(domain, ())) == names]
                for first in range(0, len(same), len(figures.SERIES)):
                    part = same[first : first + len(figures.SERIES)]
                    rows = {name: [entry.classes[domain][name].mean for entry in part] for name in names}
                    title = f"IoU of each class in {domain}, percent"
                    charts.append((domain, figures.grouped_bars(rows, [entry.name for entry in part], title)))
        return charts


def render(report: Report) -> str:
    """Render a report as HTML with the largest images that fit into `MAX_BYTES`; raise `OverflyError` if none fit."""
    template = environment().get_template("report.html.jinja")
    style = Markup((TEMPLATES.parent / "web" / "static" / "theme.css").read_text(encoding="utf-8"))  # noqa: S704
    shared = {
        "report": report, "columns": COLUMNS[:-1], "legend": LEGEND.replace("*", ""), "style": style,
        "gap_chart": report.gap_chart, "class_charts": report.class_charts,
        "curves": [
            (figures.line_chart(entry.losses, f"{entry.name}: losses over the steps"),
             figures.line_chart(entry.metrics, f"{entry.name}: validation metrics over the steps", smoothing=0.0))
            for entry in report.entries
        ],
    }  # fmt: skip
    size = 0
    for side in SIDES:
        galleries = [_embed(gallery, side, own_colors=report.own_colors) for gallery in report.galleries]
        page = template.render(galleries=galleries, **shared)
        size = len(page.encode("utf-8"))
        if size <= MAX_BYTES:
            return page
    raise OverflyError(
        f"a report of {len(report.entries)} recipes takes {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}; give "
        "fewer runs"
    )


def environment(folder: Path = TEMPLATES) -> Environment:
    """Return the template environment of a folder, with escaped values."""
    return Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )


def _embed(samples: SampleSet, side: int, *, own_colors: bool) -> dict[str, Any]:
    """Embed sample images as data URIs."""
    classes = samples.classes if own_colors else figures.accessible_colors(samples.classes)

    def tile(caption: str, ids: UInt8) -> tuple[str, str, str]:
        uri = figures.data_uri(figures.encode_png(figures.thumbnail(ids, side), classes))
        return caption, uri, describe_shares(ids, classes)

    images = []
    for sample in samples.images:
        tiles = [("image", figures.data_uri(figures.encode_webp(figures.thumbnail(sample.image, side))), "")]
        if sample.label is not None:
            tiles.append(tile("label", sample.label))
        for name, ids in sample.predictions.items():
            correct = f" · {percent(sample.accuracy[name], 0)} % correct" if name in sample.accuracy else ""
            tiles.append(tile(name + correct, ids))
        images.append({"name": sample.name, "reason": sample.reason, "tiles": tiles})
    colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in classes.colors]
    return {"samples": samples, "images": images, "legend": list(zip(classes.names, colors, strict=True))}


def describe_shares(ids: UInt8, classes: Classes) -> str:
    """Describe a class map: its classes with their shares, largest first."""
    shares = [(float((ids == index).mean()), name) for index, name in enumerate(classes.names)]
    return ", ".join(f"{name} {percent(share, 0)} %" for share, name in sorted(shares, reverse=True) if share >= 0.005)
