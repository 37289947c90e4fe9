"""Collect the content of a report from run folders: table, selections, sample images, curves, speed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import torch
import yaml

from overfly.adaptation.selection import BASELINE, Comparison, Selection, is_comparison
from overfly.benchmarking import BenchmarkRow, benchmark_rows
from overfly.core.errors import RunError
from overfly.data.domain import SPLITS, Split
from overfly.evaluation.speed import Speed, measure_speed
from overfly.models.network import build
from overfly.recipe import Recipe, with_seed
from overfly.reporting.figures import SERIES, training_curves
from overfly.reporting.report import ConfusionTable, RecipeResults, Report
from overfly.reporting.samples import SampleSet, collect_samples
from overfly.training.evaluate import Role, stored_scores
from overfly.training.run import Run

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
    several_models = len({run.recipe.model.name for run in runs}) > 1
    result: dict[Path, list[Run]] = {}
    for group in groups.values():
        recipe = group[0].recipe
        title = f"{recipe_title(recipe)}, {recipe.model.name}" if several_models else recipe_title(recipe)
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


def scored_split(runs: Sequence[Run]) -> Split:
    """Return the split on which most runs were scored; val if none was."""
    counts = {split: sum(f"{role}/{split}" in run.scores for run in runs for role in ROLES) for split in SPLITS}
    return max(("val", "test", "train"), key=lambda split: counts[split])


def collect_report(
    paths: Sequence[Path | str], *, title: str, split: Split | None, labels: bool, limit: int, speed: bool, size: int,
    device: torch.device, own_colors: bool,
) -> Report:  # fmt: skip
    """Collect the content of a report; the options are those of `overfly report`."""
    runs = find_runs(paths)
    groups = group_by_recipe(runs)
    split = split or scored_split(runs)
    galleries = _galleries(groups, labels, limit, device) if limit else []
    rows = dict(zip(groups, benchmark_rows(groups, split), strict=True))
    adapted = [name for name, group in groups.items() if group[0].recipe.method.name != "source_only"]
    expanded = adapted[-1] if adapted else next(iter(groups), None)
    return Report(
        title=title,
        date=f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
        split=split,
        entries=[_entry(name, group, rows[name], split, expand=name == expanded) for name, group in groups.items()],
        selections=_selections(runs),
        galleries=galleries,
        speeds=_speeds(runs, size, device) if speed else {},
        own_colors=own_colors,
    )


def _speeds(runs: Sequence[Run], size: int, device: torch.device) -> dict[str, Speed]:
    speeds: dict[str, Speed] = {}
    for recipe in (run.recipe for run in runs):
        if recipe.model.name not in speeds:
            domain = recipe.source or recipe.domain("target")
            network = build(recipe.model.name, len(domain.classes), training_heads=True, bands=domain.bands)
            speeds[recipe.model.name] = measure_speed(
                network, size=size, bands=domain.bands, device=device, warmup=3, repeats=15
            )
    return speeds


def _entry(name: Path, runs: Sequence[Run], row: BenchmarkRow, split: Split, *, expand: bool) -> RecipeResults:
    first = runs[0]
    losses, _, metrics = training_curves(first.log.rows())
    return RecipeResults(
        name=str(name),
        model=row.model,
        about={
            "method": row.method, "source": row.source, "augmentation": row.augmentation, "batch": str(row.batch),
            "criterion": row.criterion, "optimizer": row.optimizer, "scheduler": row.scheduler, "length": row.length,
            "minutes of training": "–" if row.minutes.mean is None else f"{row.minutes.mean:.1f}",
        },
        seeds=[run.recipe.seed for run in runs],
        miou=row.miou,
        classes=row.classes,
        gap=row.gap_closed,
        labels_opened=_labels_opened(runs),
        confusions=_confusions(runs, split, expand=expand),
        losses=dict(list(losses.items())[: 2 * len(SERIES)]),
        metrics={key: points for key, points in list(metrics.items())[: len(SERIES)] if len(points) > 1},
        runs=[run.path.name for run in runs],
        recipe=yaml.safe_dump(first.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        machine=first.machine,
    )  # fmt: skip


def _labels_opened(runs: Sequence[Run]) -> str:
    """Return how often target labels were read, and how many: ``val: 2 × (80 images)``; empty for never."""
    result: dict[str, tuple[int, int]] = {}
    for run in runs:
        for key, counts in run.scores.get("labels_opened", {}).items():
            if key.startswith("target/"):
                times, images = result.get(key, (0, 0))
                result[key] = (times + counts["times"], images + counts["images"])
    return ", ".join(f"{key.split('/')[1]}: {times} × ({images} images)" for key, (times, images) in result.items())


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
        same = pairs.setdefault(repr((recipe.target is None, domain, origin, recipe.model.name)), {})
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
