"""Adaptation with a safeguard: train source-only, recalibrated and adapted networks, compare them, recommend one."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from overfly.adaptation.candidates import CROP, ESTIMATE_SPLIT, CandidateComparison, load_candidate
from overfly.adaptation.gate import Gate
from overfly.adaptation.labels import LEARNED, LabeledTiles
from overfly.adaptation.selection import ADAPTED, BASELINE, Comparison, Selection, flatten_settings, value_text
from overfly.core.atomic_files import atomic_write, write_json, write_text
from overfly.core.errors import OverflyError, RecipeError, RunError
from overfly.core.progress import percent, print_status
from overfly.core.records import Item
from overfly.data.domain import check_masks, shortest_sides
from overfly.evaluation.images import MetricOptions, predict_scores, unlabeled_images
from overfly.evaluation.panels import comparison_figure
from overfly.evaluation.score import Sample, evaluation_mode
from overfly.methods.average_weights import AverageWeights
from overfly.methods.recalibrate import Recalibrate, RecalibrateByClass
from overfly.methods.source_only import SourceOnly
from overfly.ops.normalization import batch_norms
from overfly.recipe import Recipe
from overfly.training.engine import TrainerConfig, run_on_rank_zero
from overfly.training.evaluate import training_files_sha256
from overfly.training.run import Run, new_folder
from overfly.training.setup import prepare_training
from overfly.training.train_recipe import resolve_start, train_recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric

RECALIBRATED: dict[str, Recalibrate] = {
    "recalibrated": Recalibrate(),
    "half recalibrated": Recalibrate(share=0.5),
    "class-weighted": RecalibrateByClass(share=0.5),
}
"""Candidates that change statistics alone, by name: the best of them differs between pairs (docs/results/choice.md)."""
AVERAGED = "averaged"
"""Name of the candidate with the mean weights of the adapted ones that pass the checks."""
RECALIBRATION = {"batch": 8, "steps": 10}
"""Batch size and steps of these candidates."""
STILL_RISING = 0.01
"""Gain of source mIoU between the last validation and the best before it above which a network is undertrained."""
MAX_CROP = 384
"""Largest crop of their images, in pixels: networks predict whole images or large windows, not training crops."""


def plan_candidates(recipe: Recipe, *others: Recipe) -> dict[str, Recipe | Path]:
    """Return the recipes of all candidates: source only, with other statistics, and the given recipes.

    A recipe with ``start`` is compared with the network it starts from, any other with a source-only network trained
    with its own settings. Raises `RecipeError`: a recipe does not adapt, has no target, or differs from the first in a
    setting they must share.
    """
    baseline = _baseline(recipe)
    for number, other in enumerate(others, start=2):
        if other in (recipe, *others[: number - 2]):
            raise RecipeError(f"recipe {number} equals an earlier one; give each recipe once")
        _check_shared_settings(recipe, other, number)
    plans: dict[str, Recipe | Path] = {BASELINE: baseline}
    if not isinstance(recipe.method, Recalibrate):
        shared = {key: getattr(recipe, key) for key in ("source", "target", "model", "window", "resize", "seed")}
        shared |= {"start": baseline, "crop": _statistics_crop(recipe), **RECALIBRATION}
        plans |= {
            name: Recipe(method=method, **shared)
            for name, method in RECALIBRATED.items()
            if recipe.source is not None or not method.needs_source
        }
    if not others:
        return {**plans, ADAPTED: recipe}
    return plans | {f"{ADAPTED} {number}": candidate for number, candidate in enumerate((recipe, *others), start=1)}


def _statistics_crop(recipe: Recipe) -> int:
    """Return the largest crop, at most `MAX_CROP`, that the images of both domains fill; at least the recipe's crop."""
    if recipe.resize is not None:
        return max(recipe.crop, min(MAX_CROP, recipe.resize // 32 * 32))
    domains = [domain for domain in (recipe.source, recipe.target) if domain is not None]
    sides = [side for domain in domains for side in shortest_sides(domain)]
    return max(recipe.crop, min(MAX_CROP, min(sides) // 32 * 32)) if sides else recipe.crop


def _check_shared_settings(recipe: Recipe, other: Recipe, number: int) -> None:
    """Raise `RecipeError` unless a recipe shares source, target, seed, resize, window and start with the first."""
    started = (each.model_copy(update={"start": _baseline(each)}) for each in (recipe, other))
    shared = ("source", "target", "seed", "resize", "window", "start")
    values = (each.model_dump(mode="json") for each in started)
    first, second = (flatten_settings({key: each[key] for key in shared}) for each in values)
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key):
            advice = "recipes of one comparison share source, target, seed, resize, window and start"
            if key.startswith("start") and recipe.start is None and other.start is None:
                advice = "without start each recipe gets a source-only network of its own settings; give both one start"
            raise RecipeError(
                f"recipe {number} sets {key} to {value_text(second.get(key))}, the first to "
                f"{value_text(first.get(key))}; {advice}"
            )


def _baseline(recipe: Recipe) -> Recipe | Path:
    """Return the start of a recipe, or a source-only recipe with its settings."""
    if recipe.target is None:
        raise RecipeError("adapt needs a target domain; add target to the recipe")
    if isinstance(recipe.method, SourceOnly):
        raise RecipeError("method source_only does not adapt; set another method, such as multiscale_self_training")
    if recipe.start is not None:
        return recipe.start
    return recipe.model_copy(update={"method": SourceOnly(criterion=recipe.method.criterion), "target": recipe.target})


def adapt(
    recipe: Recipe, *others: Recipe, out: Path, fabric: "Fabric", config: TrainerConfig, gate: Gate | None = None,
    estimates: bool = True, labels: Path | None = None,
) -> Comparison:  # fmt: skip
    """Train all candidates, compare them without target labels, and recommend one.

    Candidates that are trained already are reused. The selection, the recommended network and a figure are written to a
    comparison folder beside the runs; the same recipes use the same folder. The recipes are those of the adapted
    candidates, which share a start; ``out`` is the folder of the runs. Labeled target tiles in the folder ``labels``
    decide, and one more network learns from them. Raises `OverflyError`: recipes, data or weights do not fit together.
    """
    recipes = [recipe, *others]
    plans = plan_candidates(*recipes)
    if not _check_inputs(recipes, fabric):
        plans = {name: plan for name, plan in plans.items() if name not in RECALIBRATED}
    tiles = None if labels is None else LabeledTiles.open(labels, recipe)
    comparison = CandidateComparison(recipes, gate or Gate(), fabric.device, estimates=estimates, tiles=tiles)
    quiet = config.quiet or not fabric.is_global_zero
    adapted: dict[str, Recipe | Path] = {name: plan for name, plan in plans.items() if plan in recipes}
    runs = _train_all({name: plan for name, plan in plans.items() if name not in adapted}, out, fabric, config)
    _report_short_training(runs[BASELINE], quiet=quiet)
    if len(runs) > 1:
        print_status(f"comparing {len(runs)} candidates without training", quiet=quiet)
        best = plans[run_on_rank_zero(fabric, lambda: comparison.select(runs))]
        started = {name: plan for name, plan in adapted.items() if isinstance(plan, Recipe) and plan.start is not None}
        adapted |= {name: plan.model_copy(update={"start": best}) for name, plan in started.items()}
    runs |= _train_all(adapted, out, fabric, config)
    passing = run_on_rank_zero(fabric, lambda: comparison.accepted(runs, adapted)) if len(adapted) > 1 else []
    runs |= _train_average([adapted[name] for name in passing], [runs[name] for name in passing], out, fabric, config)
    if tiles is not None and recipe.source is not None and recipe.method.needs_source:
        run_on_rank_zero(fabric, lambda: comparison.choose(runs))
        plan = adapted[run_on_rank_zero(fabric, lambda: comparison.best_of(adapted))]
        if isinstance(plan, Recipe):
            comparison.recipes = [*recipes, tiles.extend(plan)]
            runs |= _train_all({LEARNED: comparison.recipes[-1]}, out, fabric, config)
    print_status(f"comparing {len(runs)} candidates", quiet=quiet)

    def compare() -> Path:
        name = comparison.choose(runs)
        selection = comparison.selection(runs, _shared_images(recipe))
        written = _write_comparison(selection, recipe, runs, out, fabric.device)
        if recipe.source is not None:
            comparison.source_network(name, runs[name]).save(written.source_weights)
        return written.path

    return Comparison(run_on_rank_zero(fabric, compare))


def _train_average(
    plans: Sequence[Recipe | Path], runs: Sequence[Run | Path], out: Path, fabric: "Fabric", config: TrainerConfig
) -> dict[str, Run | Path]:
    """Average the weights of several adapted networks that started from the same one."""
    recipe = plans[0] if len(plans) > 1 else None
    if not isinstance(recipe, Recipe) or recipe.start is None:
        return {}
    method = AverageWeights(runs=tuple(run.path if isinstance(run, Run) else run for run in runs))
    keys = ("source", "target", "model", "start", "window", "resize", "seed", "crop", "batch", "precision")
    plan = Recipe(method=method, steps=1, **{key: getattr(recipe, key) for key in keys})
    try:
        return _train_all({AVERAGED: plan}, out, fabric, config)
    except RecipeError as error:  # a method that changes the network
        print_status(f"not averaged: {error}", quiet=config.quiet or not fabric.is_global_zero)
        return {}


def _report_short_training(run: Run | Path, *, quiet: bool) -> None:
    """Print a line if the source mIoU of source only was still rising at its last validation."""
    rows = list(run.log.rows()) if isinstance(run, Run) else []
    values = [row["source_miou"] or 0.0 for row in rows if row.get("event") == "validation" and "source_miou" in row]
    if len(values) > 1 and values[-1] - max(values[:-1]) > STILL_RISING:
        print_status(
            f"{BASELINE} is undertrained: its source mIoU rose to {percent(values[-1], 1)} from "
            f"{percent(max(values[:-1]), 1)} in the last part; more steps, or a longer --budget, make a better start",
            quiet=quiet,
        )


def _train_all(
    plans: Mapping[str, Recipe | Path], out: Path, fabric: "Fabric", config: TrainerConfig
) -> dict[str, Run | Path]:
    """Train every recipe that has no finished run below ``out``."""
    quiet = config.quiet or not fabric.is_global_zero
    recipes = {name: plan for name, plan in plans.items() if isinstance(plan, Recipe)}
    existing = {name: Run.find(out, plan) for name, plan in recipes.items()}
    done = {name: run for name, run in existing.items() if run is not None and run.finished}
    files = {name: run_on_rank_zero(fabric, partial(training_files_sha256, recipes[name])) for name in done}
    finished = [name for name, run in done.items() if run.fits(run.machine.get("start_sha256"), files[name])]
    if finished:
        print_status(f"already trained: {', '.join(finished)}", quiet=quiet)
    pending = [name for name in recipes if name not in finished]
    runs: dict[str, Run | Path] = {}
    for name, plan in plans.items():
        if isinstance(plan, Path):
            runs[name] = Run.open(plan) if plan.is_dir() else resolve_start(plan)
            continue
        if name in pending:
            print_status(f"training {pending.index(name) + 1} of {len(pending)}: {name}", quiet=quiet)
        runs[name] = train_recipe(plan, out, fabric, replace(config, quiet=config.quiet or name in finished))
    return runs


def _check_inputs(recipes: Sequence[Recipe], fabric: "Fabric") -> bool:
    """Check data, weights and teachers before any training; return whether networks have batch normalization."""
    normalized = True
    for number, recipe in enumerate(recipes, start=1):
        try:
            if recipe.source is not None:  # the masks that the comparison reads
                run_on_rank_zero(fabric, partial(check_masks, recipe.source, (recipe.validation.split, ESTIMATE_SPLIT)))
            start = resolve_start(recipe.start) if isinstance(recipe.start, Path) else None
            setup = prepare_training(recipe, fabric, TrainerConfig(quiet=True), start)
            normalized = normalized and bool(batch_norms(setup.nets.student))
        except OverflyError as error:
            if len(recipes) == 1:
                raise
            raise RecipeError(f"recipe {number}: {error}") from error
    return normalized


def _shared_images(recipe: Recipe) -> int:
    """Count target images that are labeled source images too, of this recipe or of existing starts."""
    source_images: set[object] = set()
    current: Recipe | Path | None = recipe
    while current is not None:
        if isinstance(current, Path):
            with suppress(OverflyError):
                current = Run.open(current).recipe
            if isinstance(current, Path):
                break
        for split in {"train", current.validation.split, ESTIMATE_SPLIT} if current.source is not None else ():
            with suppress(OverflyError):
                source_images |= {_identity(item) for item in current.domain("source").items(split) if item.label}
        current = current.start
    return sum(_identity(item) in source_images for item in recipe.domain("target").items("train"))


def _identity(item: Item) -> object:
    """Return the image file of an item, or the function and arguments that generate it."""
    image = item.image
    if isinstance(image, Path):
        return image.resolve()
    return (image.func, repr((image.args, image.keywords))) if isinstance(image, partial) else image


def _write_comparison(
    selection: Selection, recipe: Recipe, runs: Mapping[str, Run | Path], out: Path, device: torch.device
) -> Comparison:
    """Write the comparison folder, ``selection.json`` last."""
    comparison = _comparison_folder(selection, recipe, out)
    recommended = runs[selection.recommended]
    with atomic_write(comparison.weights) as part:
        shutil.copyfile(recommended.weights if isinstance(recommended, Run) else recommended, part)
    _draw_predictions(comparison.path / "samples" / "selection.png", recipe, runs, device)
    write_text(comparison.path / "selection.md", selection.markdown())
    write_json(comparison.path / "selection.json", selection.model_dump(mode="json"))
    return comparison


def _comparison_folder(selection: Selection, recipe: Recipe, out: Path) -> Comparison:
    """Find the comparison of the same recipes below ``out``, or create a folder."""
    folder = out.parent if (out / "recipe.yaml").is_file() else out
    for comparison in Comparison.find_all(folder):
        with suppress(RunError):
            known = comparison.selection
            if (known.recipes, known.labels) == (selection.recipes, selection.labels):
                return Comparison(comparison.path)
    domains = "-".join(domain.title.lower() for domain in (recipe.source, recipe.target) if domain)
    return Comparison(new_folder(folder, f"{domains[:80]}_comparison"))


def _draw_predictions(path: Path, recipe: Recipe, runs: Mapping[str, Run | Path], device: torch.device) -> None:
    """Draw target images with every candidate's prediction; no label is read."""
    target = recipe.domain("target")
    images = list(unlabeled_images(target, "train", MetricOptions(limit=4, crop=CROP, resize=recipe.resize)))
    rows: dict[str, dict[str, Sample]] = {f"target {number}": {} for number in range(1, len(images) + 1)}
    dtype = np.uint8 if target.max_value == 255 else np.uint16 if target.max_value > 1 else np.float32
    for name, run in runs.items():
        network = load_candidate(run).to(device)
        with evaluation_mode(network), torch.inference_mode():
            for (heading, samples), image in zip(rows.items(), images, strict=True):
                ids = predict_scores(network, image.to(device), recipe.window).argmax(0).cpu().numpy().astype(np.uint8)
                samples[name] = Sample(heading, image.permute(1, 2, 0).numpy().astype(dtype), ids)
    comparison_figure(rows.items(), target.classes, path)
