"""Adaptation with a safeguard: train source-only, recalibrated and adapted networks, compare them, recommend one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from overfly.adaptation.estimate import Estimate, estimate
from overfly.adaptation.gate import Gate, familiarity, select
from overfly.adaptation.reverse_validation import reverse_validation
from overfly.adaptation.selection import (
    ADAPTED,
    BASELINE,
    RECALIBRATED,
    CandidateReport,
    Comparison,
    Selection,
    value_text,
)
from overfly.core.atomic_files import atomic_write
from overfly.core.errors import OverflyError, RecipeError, RunError
from overfly.core.progress import print_status
from overfly.core.records import Item
from overfly.data.check import check_masks
from overfly.data.domain import Domain, Split, SplitError
from overfly.evaluation.images import MetricOptions, predict_scores, unlabeled_images
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, label_free_metrics
from overfly.evaluation.panels import comparison_figure
from overfly.evaluation.score import Sample, evaluation_mode, score
from overfly.methods.recalibrate import Recalibrate
from overfly.methods.source_only import SourceOnly
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe
from overfly.training.engine import TrainerConfig, run_on_rank_zero
from overfly.training.evaluate import evaluate_domain, has_labels, stored_scores
from overfly.training.run import Run, new_folder
from overfly.training.setup import prepare_training
from overfly.training.train_recipe import resolve_start, train_recipe

RECALIBRATION = {"batch": 16, "steps": 25}
"""Batch size and steps of the recalibrated network."""
METRIC_IMAGES = 16
"""Target images for label-free metrics."""
ESTIMATE_IMAGES = 8
"""Images of each domain for the estimate, which perturbs each in two dozen ways."""
ESTIMATE_SPLIT: Split = "val"
"""Split of the source that the estimate is calibrated on."""
CROP = 320
"""Side of the center crop of these images, in pixels."""


def plan_candidates(recipe: Recipe, *others: Recipe) -> dict[str, Recipe | Path]:
    """Return the recipes of all candidates: source only, recalibrated, and the given recipes.

    A recipe with ``start`` is compared with the network it starts from, any other with a source-only network trained
    with its own settings.

    Raises:
        RecipeError: a recipe does not adapt, has no target, or differs from the first in a setting they must share.
    """
    baseline = _baseline(recipe)
    for number, other in enumerate(others, start=2):
        if other in (recipe, *others[: number - 2]):
            raise RecipeError(f"recipe {number} equals an earlier one; give each recipe once")
        _check_shared_settings(recipe, other, number)
    plans: dict[str, Recipe | Path] = {BASELINE: baseline}
    if not isinstance(recipe.method, Recalibrate):
        shared = {
            key: getattr(recipe, key) for key in ("source", "target", "model", "crop", "window", "resize", "seed")
        }
        plans[RECALIBRATED] = Recipe(start=baseline, method=Recalibrate(), **shared, **RECALIBRATION)
    if not others:
        return {**plans, ADAPTED: recipe}
    return plans | {f"{ADAPTED} {number}": candidate for number, candidate in enumerate((recipe, *others), start=1)}


def _check_shared_settings(recipe: Recipe, other: Recipe, number: int) -> None:
    """Check that a recipe shares source, target, seed, resize, window and start with the first.

    Raises:
        RecipeError: it does not; the message names the first setting that differs.
    """
    shared = ("source", "target", "seed", "resize", "window")
    first, second = (
        _flatten({key: candidate.model_dump(mode="json")[key] for key in shared} | {"start": _start_values(candidate)})
        for candidate in (recipe, other)
    )
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key):
            advice = "recipes of one comparison share source, target, seed, resize, window and start"
            if key.startswith("start") and recipe.start is None and other.start is None:
                advice = "without start each recipe gets a source-only network of its own settings; give both one start"
            raise RecipeError(
                f"recipe {number} sets {key} to {value_text(second.get(key))}, the first to "
                f"{value_text(first.get(key))}; {advice}"
            )


def _start_values(recipe: Recipe) -> object:
    baseline = _baseline(recipe)
    return baseline.model_dump(mode="json") if isinstance(baseline, Recipe) else str(baseline)


def setting_differences(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Return for each recipe the settings that differ between recipes, by dotted name."""
    flat = [_flatten(recipe.model_dump(mode="json", exclude={"source", "target", "start"})) for recipe in recipes]
    names = list(dict.fromkeys(key for settings in flat for key in settings))
    differing = [name for name in names if any(settings.get(name) != flat[0].get(name) for settings in flat)]
    return [{name: settings[name] for name in differing if name in settings} for settings in flat]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


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
    recipe: Recipe,
    *others: Recipe,
    out: Path,
    fabric: Fabric,
    config: TrainerConfig,
    gate: Gate | None = None,
    estimates: bool = True,
) -> Comparison:
    """Train all candidates, compare them without target labels, and recommend one.

    Candidates that are trained already are reused. The selection, the recommended network and a figure are written to a
    comparison folder beside the runs; the same recipes use the same folder.

    Args:
        recipe: an adapted candidate.
        others: more adapted candidates with the same start.
        out: folder of the runs.
        fabric: launched.
        config: devices, intervals and output.
        gate: bounds of the checks; None: `Gate()`.
        estimates: estimate the target mIoU of each candidate.

    Raises:
        OverflyError: recipes, data or weights do not fit together.
    """
    recipes = [recipe, *others]
    plans = plan_candidates(*recipes)
    _check_inputs(recipes, fabric)
    runs = _train_all(plans, out, fabric, config)
    print_status(f"comparing {len(runs)} candidates", quiet=config.quiet or not fabric.is_global_zero)

    def compare() -> Path:
        selection = _compare(recipes, runs, gate or Gate(), fabric.device, estimates)
        return _write_comparison(selection, recipe, runs, out, fabric.device).path

    return Comparison(run_on_rank_zero(fabric, compare))


def _train_all(
    plans: Mapping[str, Recipe | Path], out: Path, fabric: Fabric, config: TrainerConfig
) -> dict[str, Run | Path]:
    """Train every recipe that has no finished run below ``out``."""
    quiet = config.quiet or not fabric.is_global_zero
    recipes = {name: plan for name, plan in plans.items() if isinstance(plan, Recipe)}
    existing = {name: Run.find(out, plan) for name, plan in recipes.items()}
    finished = [name for name, run in existing.items() if run is not None and run.finished]
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


def _check_inputs(recipes: Sequence[Recipe], fabric: Fabric) -> None:
    """Check data, weights and teachers of all recipes before the first training.

    Raises:
        OverflyError: they are missing or do not fit; the message names the recipe.
    """
    for number, recipe in enumerate(recipes, start=1):
        try:
            run_on_rank_zero(fabric, partial(_check_compared_masks, recipe))
            start = resolve_start(recipe.start) if isinstance(recipe.start, Path) else None
            prepare_training(recipe, fabric, TrainerConfig(quiet=True), start)
        except OverflyError as error:
            if len(recipes) == 1:
                raise
            raise RecipeError(f"recipe {number}: {error}") from error


def _check_compared_masks(recipe: Recipe) -> None:
    """Check the masks of the source that the comparison reads."""
    if recipe.source is not None:
        splits = dict.fromkeys((recipe.validation.split, ESTIMATE_SPLIT))
        check_masks(recipe.source, [split for split in splits if has_labels(recipe.source, split)])


def _has_held_out_images(recipe: Recipe) -> bool:
    """Return True if the source has a validation split with images, other than train."""
    try:
        split = recipe.validation.split
        return recipe.source is not None and split != "train" and bool(recipe.source.items(split))
    except SplitError:
        return False


def _compare(
    recipes: Sequence[Recipe], runs: Mapping[str, Run | Path], gate: Gate, device: torch.device, estimates: bool
) -> Selection:
    """Compute label-free metrics of every candidate on the same target images, apply the gate and select."""
    recipe = recipes[0]
    target = recipe.domain("target")
    networks = {name: _load(run) for name, run in runs.items()}
    baseline = networks[BASELINE]
    options = MetricOptions(METRIC_IMAGES, CROP, recipe.resize, recipe.window, device)

    def metrics_of(network: Segmenter, domain: Domain, split: Split) -> LabelFreeMetrics:
        return label_free_metrics(network, domain, split, options, reference=baseline, reference_classes=True)

    metrics: dict[str, LabelFreeMetrics] = {}
    estimated: dict[str, Estimate] = {}
    for name, network in networks.items():
        source_miou = _source_miou(recipe, runs[name], device)
        metrics[name] = metrics_of(network, target, "train").model_copy(update={"source_miou": source_miou})
        if estimates and recipe.source is not None and has_labels(recipe.source, ESTIMATE_SPLIT):
            estimated[name] = estimate(network, recipe.source, target, replace(options, limit=ESTIMATE_IMAGES))
    familiar = reverse = None
    if _has_held_out_images(recipe):
        source, held_out = recipe.domain("source"), recipe.validation.split
        familiar = familiarity(metrics_of(baseline, source, held_out), metrics[BASELINE])
        if not gate.skip_familiarity and has_labels(source, "train") and has_labels(source, held_out):
            reverse = reverse_validation(baseline, source, target, held_out, options)
    rejections = gate.all_rejections(BASELINE, metrics, familiar, reverse)
    adapted = [name for name in runs if name not in (BASELINE, RECALIBRATED)]
    settings = dict(zip(adapted, setting_differences(recipes), strict=True))
    accepted = {name: metrics[name] for name in (BASELINE, *adapted, *metrics) if not rejections.get(name)}
    candidates = {
        name: CandidateReport(
            run=str(run.path if isinstance(run, Run) else run),
            metrics=metrics[name],
            settings=settings.get(name, {}),
            rejections=rejections.get(name, ()),
            estimate=estimated.get(name),
            labeled_miou=_labeled_miou(run, recipe),
        )
        for name, run in runs.items()
    }
    return Selection(
        recommended=select(BASELINE, accepted, gate.tolerance),
        candidates=candidates,
        recipes=tuple(entry.model_dump(mode="json") for entry in recipes),
        gate=gate,
        target=target.model_dump(mode="json"),
        familiarity=familiar,
        reverse_validation=reverse,
        labels_opened=_shared_images(recipe),
    )


def _shared_images(recipe: Recipe) -> int:
    """Count target images that are labeled source images too, of this recipe or the recipes it starts from.

    Starts that do not exist any more are not counted.
    """
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


def _load(run: Run | Path) -> Segmenter:
    return run.segmenter() if isinstance(run, Run) else Segmenter.load(run)


def _source_miou(recipe: Recipe, run: Run | Path, device: torch.device) -> float | None:
    """MIoU on the source's held-out labels, scored with the recipe's resize and window; stored scores are reused."""
    split = recipe.validation.split
    if recipe.source is None or not has_labels(recipe.source, split):
        return None
    if isinstance(run, Run) and (run.recipe.resize, run.recipe.window) == (recipe.resize, recipe.window):
        stored = stored_scores(run, "source", split, recipe.source)
        return (stored or evaluate_domain(run, recipe.source, "source", split, device=device)).miou
    window = recipe.window or None
    return score(_load(run), recipe.source, split, resize=recipe.resize, window=window, device=device).miou


def _labeled_miou(run: Run | Path, recipe: Recipe) -> dict[str, float | None]:
    """MIoU by domain and split in the run's ``scores.json``; no label is read."""
    if not isinstance(run, Run):
        return {}
    splits: tuple[Split, ...] = ("val", "test")
    mious = {}
    for role, domain in (("source", recipe.source), ("target", recipe.target)):
        for split in splits:
            scores = stored_scores(run, role, split, domain) if domain is not None else None
            if scores is not None:
                mious[f"{role}/{split}"] = scores.miou
    return mious


def _write_comparison(
    selection: Selection, recipe: Recipe, runs: Mapping[str, Run | Path], out: Path, device: torch.device
) -> Comparison:
    """Write the comparison folder, ``selection.json`` last."""
    comparison = _comparison_folder(selection, recipe, out)
    recommended = runs[selection.recommended]
    with atomic_write(comparison.weights) as part:
        shutil.copyfile(recommended.weights if isinstance(recommended, Run) else recommended, part)
    _draw_predictions(comparison.path / "samples" / "selection.png", recipe, runs, device)
    content = json.dumps(selection.model_dump(mode="json"), indent=2) + "\n"
    for name, text in (("selection.md", selection.markdown()), ("selection.json", content)):
        file = comparison.path / name
        with atomic_write(file) as part:
            part.write_text(text, encoding="utf-8")
    return comparison


def _comparison_folder(selection: Selection, recipe: Recipe, out: Path) -> Comparison:
    """Find the comparison of the same recipes below ``out``, or create a folder."""
    folder = out.parent if (out / "recipe.yaml").is_file() else out
    for comparison in Comparison.find_all(folder):
        with suppress(RunError):
            if comparison.selection.recipes == selection.recipes:
                return Comparison(comparison.path)
    domains = "-".join(domain.title.lower() for domain in (recipe.source, recipe.target) if domain)
    title = f"{domains}_comparison".replace("/", "-").replace(" ", "-")
    return Comparison(new_folder(folder, title))


def _draw_predictions(path: Path, recipe: Recipe, runs: Mapping[str, Run | Path], device: torch.device) -> None:
    """Draw target images with every candidate's prediction; no label is read."""
    target = recipe.domain("target")
    images = list(unlabeled_images(target, "train", MetricOptions(limit=4, crop=CROP, resize=recipe.resize)))
    rows: dict[str, dict[str, Sample]] = {f"target {number}": {} for number in range(1, len(images) + 1)}
    dtype = np.uint8 if target.max_value == 255 else np.uint16 if target.max_value > 1 else np.float32
    for name, run in runs.items():
        network = _load(run).to(device)
        with evaluation_mode(network), torch.inference_mode():
            for (heading, samples), image in zip(rows.items(), images, strict=True):
                ids = predict_scores(network, image.to(device), recipe.window).argmax(0).cpu().numpy().astype(np.uint8)
                samples[name] = Sample(heading, image.permute(1, 2, 0).numpy().astype(dtype), ids)
    comparison_figure(rows.items(), target.classes, path)
