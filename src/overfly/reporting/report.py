"""A report: one HTML file that holds everything, opens from disk, asks no network and stays below 5 MB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from overfly.core.classes import Classes
from overfly.core.errors import OverflyError
from overfly.evaluation.speed import Speed
from overfly.reporting.charts import SERIES, Bar, bars, grouped, lines
from overfly.reporting.curves import Points
from overfly.reporting.embedded import png, safe, small, small_picture, uri, webp
from overfly.reporting.extremes import Album
from overfly.training.evaluate import Role

LARGEST = 5_000_000
"""Bytes that a report may have."""
SIDES = (320, 240, 180, 120, 80)
"""Longest sides of its pictures in pixels, the first that fits the bytes."""
HERE = Path(__file__).parent


class Quantity(Protocol):
    """A figure over seeds, such as `overfly.benchmarking.SeedStatistics`."""

    @property
    def mean(self) -> float | None:
        """Mean over the seeds."""

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds."""

    @property
    def values(self) -> Sequence[float | None]:
        """One value a seed."""

    def percent(self) -> str:
        """In percent, as a table shows it."""


@dataclass(frozen=True)
class Matrix:
    """Counts of pixels (K, K), rows the labels, columns the predictions, of all seeds together."""

    title: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]
    open: bool = False
    """Whether it is shown without being asked for."""

    @property
    def rows(self) -> list[tuple[str, float, list[float | None]]]:
        """Each label's name, its share of all pixels, and what share of it was predicted as each class."""
        total = max(sum(map(sum, self.counts)), 1)
        found = []
        for name, row in zip(self.names, self.counts, strict=True):
            labeled = sum(row)
            found.append((name, labeled / total, [count / labeled if labeled else None for count in row]))
        return found


@dataclass(frozen=True)
class Entry:
    """One recipe over its seeds.

    Attributes:
        name: unique in the report.
        network: name of the network.
        about: facts in words: method, source, length, criterion.
        seeds: of the runs.
        miou: by the title of the place.
        classes: IoU of each class by the title of the place.
        gap: share of the way from source only to the oracle.
        opened: how often target labels were read, and how many, in words; empty where none were.
        matrices: one a place.
        losses: curves of training of the first seed.
        measured: what was measured while it trained.
        runs: folders, names alone.
        recipe: YAML of the first seed.
        machine: where the first seed was trained.
    """

    name: str
    network: str
    about: Mapping[str, str]
    seeds: Sequence[int]
    miou: Mapping[str, Quantity]
    classes: Mapping[str, Mapping[str, Quantity]]
    gap: Quantity | None
    opened: str
    matrices: Sequence[Matrix]
    losses: Points
    measured: Points
    runs: Sequence[str]
    recipe: str
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """What is known of an adaptation without target labels.

    Attributes:
        title: the run it was written for.
        sentence: the verdict.
        columns: headings.
        rows: network, cells, and a word such as recommended or refused.
        against: what speaks against networks, as sentences.
        ways: which run each of several adapted networks is, and in what it differs.
        familiarity: how familiar the target is to the network before adaptation, in words; empty where unknown.
        labels_opened: target labels that were read for it.
    """

    title: str
    sentence: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str], str]]
    against: Sequence[str]
    ways: Sequence[str]
    familiarity: str
    labels_opened: int


@dataclass(frozen=True)
class Gallery:
    """Pictures of a domain, and the classes they are painted in."""

    album: Album
    classes: Classes


@dataclass(frozen=True)
class Report:
    """Everything that a report shows."""

    title: str
    made: str
    split: str
    entries: Sequence[Entry]
    evidence: Sequence[Evidence] = ()
    galleries: Sequence[Gallery] = ()
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    own_colors: bool = False

    @property
    def places(self) -> list[str]:
        """Titles of all places that something was scored in."""
        return list(dict.fromkeys(place for entry in self.entries for place in entry.miou))

    @property
    def gap_chart(self) -> Markup | None:
        """Bars of the share of the gap that was closed; none where no entry has one."""
        found = [
            Bar(entry.name, entry.gap.mean, entry.gap.deviation, entry.gap.values)
            for entry in self.entries
            if entry.gap and entry.gap.mean is not None
        ]
        return bars(found, "Share of the gap between source only and oracle that was closed") if found else None

    @property
    def class_charts(self) -> list[tuple[str, Markup]]:
        """For each place, IoU of each class; a chart holds as many entries as there are colors."""
        charts = []
        for place in self.places:
            kinds = dict.fromkeys(tuple(each.classes[place]) for each in self.entries if place in each.classes)
            for kind in kinds:
                same = [each for each in self.entries if tuple(each.classes.get(place, ())) == kind]
                for first in range(0, len(same), len(SERIES)):
                    part = same[first : first + len(SERIES)]
                    rows = {name: [each.classes[place][name].mean for each in part] for name in kind}
                    words = f"IoU of each class in {place}, percent"
                    charts.append((place, grouped(rows, [each.name for each in part], words)))
        return charts


def render(report: Report) -> str:
    """The page, its pictures as large as the bytes allow.

    Raises:
        OverflyError: there are so many runs that it is too large even so.
    """
    page = ""
    for side in SIDES:
        page = _page(report, side)
        if len(page.encode("utf-8")) <= LARGEST:
            return page
    raise OverflyError(
        f"a report of {len(report.entries)} recipes takes {len(page.encode('utf-8')) / 1e6:.1f} MB, more than "
        f"{LARGEST / 1e6:.0f}; make one of fewer runs"
    )


def environment(folder: Path = HERE) -> Environment:
    """Templates of a folder; every value is escaped."""
    return Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )


def _page(report: Report, side: int) -> str:
    template = environment().get_template("report.html.jinja")
    style = Markup((HERE.parent / "web" / "static" / "look.css").read_text(encoding="utf-8"))  # noqa: S704
    galleries = [_shown(gallery, side, own=report.own_colors) for gallery in report.galleries]
    return template.render(report=report, style=style, galleries=galleries, lines=lines)


def _shown(gallery: Gallery, side: int, *, own: bool) -> dict[str, Any]:
    """A gallery with its pictures as addresses."""
    classes = gallery.classes if own else safe(gallery.classes)
    scenes = []
    for scene in gallery.album.scenes:
        tiles = [("image", uri(webp(small_picture(scene.picture, side))), "")]
        if scene.label is not None:
            tiles.append(("label", uri(png(small(scene.label, side), classes)), shares(scene.label, classes)))
        for name, ids in scene.maps.items():
            right = f" · {100 * scene.accuracy[name]:.0f} % right" if name in scene.accuracy else ""
            tiles.append((name + right, uri(png(small(ids, side), classes)), shares(ids, classes)))
        scenes.append({"name": scene.name, "why": scene.why, "tiles": tiles})
    colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in classes.colors]
    return {"album": gallery.album, "scenes": scenes, "legend": list(zip(classes.names, colors, strict=True))}


def shares(ids: Any, classes: Classes) -> str:
    """What a map shows, in words: its classes with their shares, largest first."""
    found = [(float((ids == index).mean()), name) for index, name in enumerate(classes.names)]
    return ", ".join(f"{name} {100 * share:.0f} %" for share, name in sorted(found, reverse=True) if share >= 0.005)


__all__ = ["Entry", "Evidence", "Gallery", "Matrix", "Quantity", "Report", "Role", "environment", "render", "shares"]
