"""Collect a report from run folders, and render it as a self-contained HTML file of at most 5 MB."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from overfly.adaptation.selection import BASELINE, COLUMNS, LEGEND, Comparison, Selection, is_comparison
from overfly.benchmarking import BenchmarkRow, benchmark_rows
from overfly.core.classes import Classes
from overfly.core.errors import OverflyError, RunError
from overfly.core.progress import percent
from overfly.core.records import UInt8
from overfly.data.domain import Split
from overfly.evaluation.speed import Speed, measure_speed
from overfly.models.network import build
from overfly.recipe import Recipe, with_seed
from overfly.reporting import figures
from overfly.reporting.figures import SERIES, training_curves
from overfly.reporting.samples import SampleSet, collect_samples
from overfly.training.evaluate import Role, stored_scores
from overfly.training.run import Run

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


@dataclass(frozen=True)
class RecipeResults:
    """A recipe with the results of its seeds, a run each, under a name that is unique in the report.

    Attributes:
        row: settings, and scores over the seeds.
        confusions: one a domain.
        losses, metrics: training and validation curves of the first seed.
        recipe: YAML of the first seed's recipe.
    """

    name: str
    row: BenchmarkRow
    runs: Sequence[Run]
    confusions: Sequence[ConfusionTable]
    losses: figures.Points
    metrics: figures.Points
    recipe: str


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
        return list(dict.fromkeys(domain for entry in self.entries for domain in entry.row.miou))


def render(report: Report) -> str:
    """Render a report as HTML with the largest images that fit into `MAX_BYTES`; raise `OverflyError` if none fit."""
    template = environment().get_template("report.html.jinja")
    style = Markup((TEMPLATES.parent / "web" / "static" / "theme.css").read_text(encoding="utf-8"))  # noqa: S704
    shared = {
        "report": report, "columns": COLUMNS[:-1], "legend": LEGEND.replace("*", ""), "style": style,
        "figures": figures,
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
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=True,
        # escape what stands for bytes of a file name that is not UTF-8; HTML stays HTML
        finalize=lambda value: type(value)(value.encode(errors="backslashreplace").decode())
        if isinstance(value, str) else value,
    )  # fmt: skip


def _embed(samples: SampleSet, side: int, *, own_colors: bool) -> dict[str, Any]:
    """Embed sample images as data URIs."""
    classes = samples.classes if own_colors else figures.accessible_colors(samples.classes)

    def tile(caption: str, ids: UInt8) -> tuple[str, str, str]:
        uri = figures.data_uri(figures.encode_png(figures.thumbnail(ids, side), classes))
        return caption, uri, describe_shares(ids, classes)

    images = []
    for sample in samples.images:
        image = Image.fromarray(figures.thumbnail(sample.image, side))
        tiles = [("image", figures.data_uri(figures.encode_image(image, "WEBP", quality=78, method=4)), "")]
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


MAX_NETWORKS = 4
"""Maximum networks whose predictions are shown side by side."""
ROLES: tuple[Role, ...] = ("target", "source")


def find_runs(paths: Sequence[Path | str]) -> list[Run]:
    """Return the runs of run folders, comparison folders, or folders of runs; raise `RunError` if one has none."""
    result: dict[Path, Run] = {}
    for path in map(Path, paths):
        if is_comparison(path):
            comparison = Comparison(path)
            candidates = [comparison.run(name) for name in comparison.selection.candidates]
            result |= {run.path.resolve(): run for run in candidates if run is not None}
            continue
        several = not (path / "recipe.yaml").is_file() and path.is_dir()
        runs = [Run(file.parent) for file in sorted(path.glob("*/recipe.yaml"))] if several else [Run.open(path)]
        if not runs:
            raise RunError(f"{path} contains no run; give folders that `overfly train` wrote, or a folder of them")
        result |= {run.path.resolve(): run for run in runs}
    return list(result.values())


def group_by_recipe(runs: Sequence[Run]) -> dict[Path, list[Run]]:
    """Group runs that differ only in their seed, by recipe title; adapted networks last."""
    groups: dict[str, list[Run]] = {}
    order = {"source_only": 0, "recalibrate": 1}
    for run in sorted(runs, key=lambda run: (order.get(run.recipe.method.name, 2), run.path.name)):
        groups.setdefault(json.dumps(with_seed(run.recipe, 0).model_dump(mode="json"), sort_keys=True), []).append(run)
    several_models = len({run.recipe.model.architecture for run in runs}) > 1
    result: dict[Path, list[Run]] = {}
    for group in groups.values():
        recipe = group[0].recipe
        title = f"{recipe_title(recipe)}, {recipe.model.architecture}" if several_models else recipe_title(recipe)
        name, number = title, 1
        while Path(name) in result:
            number += 1
            name = f"{title} ({number})"
        result[Path(name)] = sorted(group, key=lambda run: run.recipe.seed)
    return result


def recipe_title(recipe: Recipe) -> str:
    """Return the title of a recipe, such as ``source only, Urban to Rural``."""
    domains = " to ".join(domain.title for domain in (recipe.source, recipe.target) if domain is not None)
    return f"{recipe.method.name.replace('_', ' ')}, {domains}"


def collect_report(
    paths: Sequence[Path | str], *, title: str, split: Split | None, labels: bool, limit: int, speed: bool, size: int,
    device: torch.device, own_colors: bool,
) -> Report:  # fmt: skip
    """Collect the content of a report; the options are those of `overfly report`."""
    runs = find_runs(paths)
    groups = group_by_recipe(runs)
    counts = Counter(key.partition("/")[2] for run in runs for key in run.scores if key.partition("/")[0] in ROLES)
    by_count: list[Split] = sorted(("val", "test", "train"), key=lambda name: -counts[name])
    split = split or by_count[0]
    galleries = _galleries(groups, labels, limit, device) if limit else []
    rows = dict(zip(groups, benchmark_rows(groups, split), strict=True))
    adapted = [name for name, group in groups.items() if group[0].recipe.method.name != "source_only"]
    expanded = adapted[-1] if adapted else next(iter(groups), None)
    return Report(
        title=title, date=f"{datetime.now().astimezone():%Y-%m-%d %H:%M}", split=split,
        entries=[_entry(name, group, rows[name], split, expand=name == expanded) for name, group in groups.items()],
        selections=_selections(runs), galleries=galleries, speeds=_speeds(runs, size, device) if speed else {},
        own_colors=own_colors,
    )  # fmt: skip


def _speeds(runs: Sequence[Run], size: int, device: torch.device) -> dict[str, Speed]:
    speeds: dict[str, Speed] = {}
    for run in runs:
        name, domain = run.recipe.model.architecture, run.recipe.source or run.recipe.domain("target")
        if name not in speeds:
            network = run.segmenter().network if run.finished else build(name, len(domain.classes), bands=domain.bands)
            speeds[name] = measure_speed(network, size=size, bands=domain.bands, device=device, warmup=3, repeats=15)
    return speeds


def _entry(name: Path, runs: Sequence[Run], row: BenchmarkRow, split: Split, *, expand: bool) -> RecipeResults:
    first = runs[0]
    losses, _, metrics = training_curves(first.log.rows())
    return RecipeResults(
        name=str(name), row=row, runs=runs,
        confusions=_confusions(runs, split, expand=expand), losses=dict(list(losses.items())[: 2 * len(SERIES)]),
        metrics={key: points for key, points in list(metrics.items())[: len(SERIES)] if len(points) > 1},
        recipe=yaml.safe_dump(first.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )  # fmt: skip


def _confusions(runs: Sequence[Run], split: Split, *, expand: bool) -> list[ConfusionTable]:
    result: list[ConfusionTable] = []
    for role in ROLES:
        domain = getattr(runs[0].recipe, role)
        scores = [stored_scores(run, role, split, domain) for run in runs] if domain is not None else []
        counts = [torch.tensor(value.confusion) for value in scores if value is not None]
        if counts:
            total = torch.stack(counts).sum(0).tolist()
            title = f"{domain.title} ({role})"
            result.append(ConfusionTable(title, domain.classes.names, total, open=expand and not result))
    return result


def _selections(runs: Sequence[Run]) -> dict[str, Selection]:
    """Return the selections of comparisons beside the runs, in which a run is a candidate."""
    names = {run.path.name for run in runs}
    folders = dict.fromkeys(run.path.parent for run in runs)
    comparisons = [comparison for folder in folders for comparison in Comparison.find_all(folder)]
    return {
        comparison.path.name: comparison.selection
        for comparison in comparisons
        if names & {Path(candidate.run).name for candidate in comparison.selection.candidates.values()}
    }


def _galleries(groups: Mapping[Path, Sequence[Run]], labels: bool, limit: int, device: torch.device) -> list[SampleSet]:
    """Collect sample images for each pair of domains, with the predictions of its networks."""
    pairs: dict[str, dict[str, Run]] = {}
    for name, runs in groups.items():
        recipe, run = runs[0].recipe, runs[0]
        if not run.finished:
            continue
        domain = recipe.target or recipe.source
        origin = recipe.start.source if recipe.source is None and isinstance(recipe.start, Recipe) else recipe.source
        same = pairs.setdefault(repr((recipe.target is None, domain, origin, recipe.model.architecture)), {})
        baseline = _baseline(run) if recipe.method.name != "source_only" else None
        if baseline is not None and not any(other.recipe.method.name == "source_only" for other in same.values()):
            same[BASELINE] = baseline
        same[str(name)] = run
    result = []
    for same in pairs.values():
        names = list(same)
        names = names if len(names) <= MAX_NETWORKS else [*names[: MAX_NETWORKS - 1], names[-1]]
        shown = {name: same[name] for name in names}
        first = next(iter(shown.values()))
        role: Role = "source" if first.recipe.target is None else "target"
        result.append(collect_samples(shown, role, labels=labels, limit=limit, device=device))
    return result


def _baseline(run: Run) -> Run | None:
    """Return the finished start run of a run, beside it or at the path in its recipe, or None."""
    start = run.recipe.start
    result = Run.find(run.path.parent, start) if isinstance(start, Recipe) else None
    if isinstance(start, Path) and (start / "recipe.yaml").is_file():
        result = Run.open(start)
    return result if result is not None and result.finished else None
