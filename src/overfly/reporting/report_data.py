"""What some runs have to tell, gathered for a report: table, evidence, pictures, curves, speed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError

from overfly.adaptation.gate import geometric_consistency
from overfly.adaptation.selection import BEFORE, Selection
from overfly.benchmarking import BenchmarkRow, benchmark_rows
from overfly.core.errors import RunError
from overfly.data.domain import SPLITS, Split
from overfly.evaluation.speed import Speed, measure_speed
from overfly.models.network import build
from overfly.recipe import Recipe
from overfly.reporting.charts import SERIES
from overfly.reporting.curves import collected
from overfly.reporting.extremes import Album, album
from overfly.reporting.report import Entry, Evidence, Gallery, Matrix, Report
from overfly.training.evaluate import Role, stored_scores
from overfly.training.run import Run

MOST = 4
"""Networks that stand beside each other in pictures."""
ROLES: tuple[Role, ...] = ("target", "source")


def find_runs(paths: Sequence[Path | str]) -> list[Run]:
    """The runs that some folders mean: runs, or folders of runs.

    Raises:
        RunError: a folder means none.
    """
    found: dict[Path, Run] = {}
    for entry in map(Path, paths):
        folder = not (entry / "recipe.yaml").is_file() and entry.is_dir()
        runs = [Run(file.parent) for file in sorted(entry.glob("*/recipe.yaml"))] if folder else [Run.open(entry)]
        if not runs:
            raise RunError(f"{entry} holds no run; give folders that `overfly train` named, or a folder of them")
        found |= {run.path.resolve(): run for run in runs}
    return list(found.values())


def by_recipe(runs: Sequence[Run]) -> dict[Path, list[Run]]:
    """The runs of each recipe, all its seeds together, by a name for people; adapted networks last, rising seeds."""
    kinds: dict[str, list[Run]] = {}
    order = {"source_only": 0, "recalibrate": 1}
    for run in sorted(runs, key=lambda run: (order.get(run.recipe.method.name, 2), run.path.name)):
        kinds.setdefault(json.dumps(_without_seed(run.recipe), sort_keys=True), []).append(run)
    found: dict[Path, list[Run]] = {}
    for same in kinds.values():
        recipe = same[0].recipe
        words = recipe_title(recipe)
        several = len({run.recipe.model.name for run in runs}) > 1
        words = f"{words}, {recipe.model.name}" if several else words
        name, number = words, 1
        while Path(name) in found:
            number += 1
            name = f"{words} ({number})"
        found[Path(name)] = sorted(same, key=lambda run: run.recipe.seed)
    return found


def recipe_title(recipe: Recipe) -> str:
    """A recipe for people: ``source only, Urban to Rural``."""
    places = " to ".join(domain.title for domain in (recipe.source, recipe.target) if domain is not None)
    return f"{recipe.method.name.replace('_', ' ')}, {places}"


def scored_split(runs: Sequence[Run]) -> Split:
    """The split that most runs were scored on, val where none was."""
    counts = {split: sum(f"{role}/{split}" in run.scores for run in runs for role in ROLES) for split in SPLITS}
    return max(("val", "test", "train"), key=lambda split: counts[split])


def collect_report(
    paths: Sequence[Path | str],
    *,
    title: str,
    split: Split | None,
    labels: bool,
    limit: int,
    speed: bool,
    size: int,
    device: torch.device,
    own_colors: bool,
) -> Report:
    """Everything that a report of some runs shows.

    Args:
        paths: runs or folders of runs.
        title: of the page.
        split: whose scores are shown; None: the one that most runs were scored on.
        labels: open labels of val for the pictures.
        limit: pictures that the worst and the best are chosen from; 0: no pictures.
        speed: measure the networks here and now.
        size: side of the image that speed is measured with.
        device: where networks run.
        own_colors: paint classes in their own colors.
    """
    runs = find_runs(paths)
    done = by_recipe(runs)
    shown = split or scored_split(runs)
    albums = _albums(done, labels, limit, device) if limit else []
    rows = dict(zip(done, benchmark_rows(done, shown), strict=True))
    speeds: dict[str, Speed] = {}
    for same in done.values():
        recipe = same[0].recipe
        if speed and recipe.model.name not in speeds:
            domain = recipe.source or recipe.domain("target")
            network = build(recipe.model.name, len(domain.classes), training_heads=True, bands=domain.bands)
            speeds[recipe.model.name] = measure_speed(
                network, size=size, bands=domain.bands, device=device, warmup=3, repeats=15
            )
    first = _first_target(done)
    return Report(
        title=title,
        made=f"Made by overfly on {datetime.now().astimezone():%Y-%m-%d %H:%M}",
        split=shown,
        entries=[_entry(name, same, rows[name], shown, open_=name == first) for name, same in done.items()],
        evidence=_evidences(runs),
        galleries=albums,
        speeds=speeds,
        own_colors=own_colors,
    )


def _without_seed(recipe: Recipe) -> object:
    return recipe.model_copy(update={"seed": 0, "start": _unseeded(recipe.start)}).model_dump(mode="json")


def _unseeded(start: Recipe | Path | None) -> Recipe | Path | None:
    if not isinstance(start, Recipe):
        return start
    return start.model_copy(update={"seed": 0, "start": _unseeded(start.start)})


def _first_target(done: Mapping[Path, Sequence[Run]]) -> Path | None:
    """Whose confusion matrix is shown without being asked for: the last adapted network's, else the first."""
    adapted = [name for name, runs in done.items() if runs[0].recipe.method.name != "source_only"]
    return adapted[-1] if adapted else next(iter(done), None)


def _entry(name: Path, runs: Sequence[Run], row: BenchmarkRow, split: Split, *, open_: bool) -> Entry:
    first = runs[0]
    losses, rates, measured = collected(first.log.rows())
    del rates
    return Entry(
        name=str(name),
        network=row.model,
        about={
            "method": row.method, "source": row.source, "augmentation": row.augmentation, "batch": str(row.batch),
            "criterion": row.criterion, "optimizer": row.optimizer, "scheduler": row.scheduler, "length": row.length,
            "minutes of training": "–" if row.minutes.mean is None else f"{row.minutes.mean:.1f}",
        },
        seeds=[run.recipe.seed for run in runs],
        miou=row.miou,
        classes=row.classes,
        gap=row.gap_closed,
        opened=_opened(runs),
        matrices=_matrices(runs, split, open_=open_),
        losses=dict(list(losses.items())[: 2 * len(SERIES)]),
        measured={key: points for key, points in list(measured.items())[: len(SERIES)] if len(points) > 1},
        runs=[run.path.name for run in runs],
        recipe=yaml.safe_dump(first.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        machine=first.machine,
    )  # fmt: skip


def _opened(runs: Sequence[Run]) -> str:
    """How often target labels were read for these runs, in words."""
    found: dict[str, tuple[int, int]] = {}
    for run in runs:
        for key, counts in run.scores.get("labels_opened", {}).items():
            if key.startswith("target/"):
                times, images = found.get(key, (0, 0))
                found[key] = (times + counts["times"], images + counts["images"])
    return ", ".join(f"{key.split('/')[1]}: {times} × ({images} images)" for key, (times, images) in found.items())


def _matrices(runs: Sequence[Run], split: Split, *, open_: bool) -> list[Matrix]:
    recipe = runs[0].recipe
    found: list[Matrix] = []
    for role in ROLES:
        domain = getattr(recipe, role)
        scores = [stored_scores(run, role, split, domain) for run in runs] if domain is not None else []
        counts = [torch.tensor(each.confusion) for each in scores if each is not None]
        if counts:
            total = torch.stack(counts).sum(0).tolist()
            found.append(Matrix(f"{domain.title} ({role})", domain.classes.names, total, open_ and not found))
    return found


def _evidences(runs: Sequence[Run]) -> list[Evidence]:
    """The verdicts that lie in some runs' folders; one that lies in several, as of several ways to adapt, once."""
    found: dict[str, Evidence] = {}
    for run in runs:
        evidence = _evidence(run)
        if evidence is not None:
            found.setdefault((run.path / "selection.json").read_text(encoding="utf-8"), evidence)
    return list(found.values())


def _evidence(run: Run) -> Evidence | None:
    """What `overfly adapt` wrote, if it did."""
    file = run.path / "selection.json"
    if not file.is_file():
        return None
    try:
        selection = Selection.model_validate_json(file.read_bytes())
    except ValidationError:
        raise RunError(f"{file} is damaged; delete it, or run `overfly adapt` again") from None
    rows = []
    for role, report in selection.candidates.items():
        seen, guess = report.metrics, report.estimate
        cells = [seen.source_miou, seen.masked_miou, seen.views_miou, geometric_consistency(seen), seen.agreement]
        between = f"{_percent(guess.miou)} ({_percent(guess.low)} to {_percent(guess.high)})" if guess else "–"
        word = "recommended" if role == selection.recommended else "refused" if report.rejections else ""
        rows.append((role, [*map(_percent, cells), between], word))
    return Evidence(
        title=run.path.name,
        sentence=selection.summary[0].upper() + selection.summary[1:] + ".",
        columns=["source", "masked", "views", "steady", "as before", "target, estimated"],
        rows=rows,
        against=[f"{role}: {reason}" for role, each in selection.candidates.items() for reason in each.rejections],
        ways=selection.differences,
        familiarity=selection.familiarity_summary,
        labels_opened=selection.labels_opened,
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _albums(done: Mapping[Path, Sequence[Run]], labels: bool, limit: int, device: torch.device) -> list[Gallery]:
    """Pictures of every domain that networks were to work in, with those of the same pair beside each other."""
    pairs: dict[str, dict[str, Run]] = {}
    for name, runs in done.items():
        recipe, run = runs[0].recipe, runs[0]
        if not run.finished:
            continue
        domain = recipe.target or recipe.source
        key = json.dumps([recipe.target is None, domain.model_dump(mode="json") if domain else None], sort_keys=True)
        origin = recipe.start.source if recipe.source is None and isinstance(recipe.start, Recipe) else recipe.source
        pair = f"{key} {origin.model_dump_json() if origin else ''} {recipe.model.name}"
        before = _before(run) if recipe.method.name != "source_only" else None
        same = pairs.setdefault(pair, {})
        if before is not None and not any(each.recipe.method.name == "source_only" for each in same.values()):
            same[BEFORE] = before
        same[str(name)] = run
    found: list[Album] = []
    classes = []
    for same in pairs.values():
        kept = list(same.items())
        shown = dict(kept if len(kept) <= MOST else [*kept[: MOST - 1], kept[-1]])
        role: Role = "source" if next(iter(shown.values())).recipe.target is None else "target"
        found.append(album(shown, role, labels=labels, limit=limit, device=device))
        classes.append(next(iter(shown.values())).segmenter().classes)
    return [Gallery(each, own) for each, own in zip(found, classes, strict=True)]


def _before(run: Run) -> Run | None:
    """The run that another was adapted from, if it lies beside it or where the recipe says."""
    start = run.recipe.start
    before = Run.find(run.path.parent, start) if isinstance(start, Recipe) else None
    if isinstance(start, Path) and (start / "recipe.yaml").is_file():
        before = Run.open(start)
    return before if before is not None and before.finished else None


__all__ = ["by_recipe", "collect_report", "find_runs", "recipe_title", "scored_split"]
