"""Adaptation that does no harm: source only, recalibrated and adapted in one way or in several.

All are looked at without labels, and one of them is recommended.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from overfly.adaptation.estimate import Estimate, estimate
from overfly.adaptation.gate import Gate, familiarity, select
from overfly.adaptation.reverse_validation import reverse_validation
from overfly.adaptation.selection import ADAPTED, BEFORE, RECALIBRATED, CandidateReport, Selection, said
from overfly.core.atomic_files import atomic_write
from overfly.core.errors import OverflyError, RecipeError
from overfly.core.records import Item
from overfly.data.domain import Split, SplitError
from overfly.evaluation.images import predict_scores, unlabeled_images
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, label_free_metrics
from overfly.evaluation.panels import comparison
from overfly.evaluation.samples import Sample
from overfly.evaluation.score import evaluation_mode, score
from overfly.methods.recalibrate import Recalibrate
from overfly.methods.source_only import SourceOnly
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe
from overfly.training.engine import TrainerConfig, run_on_rank_zero
from overfly.training.evaluate import evaluate_domain, has_labels, stored_scores
from overfly.training.run import Run
from overfly.training.setup import prepare_training
from overfly.training.train_recipe import resolve_start, train_recipe

RECALIBRATION = {"batch": 16, "steps": 25}
"""How much of the target the recalibrated network sees."""
LOOKED_AT = 16
"""Target pictures that networks are looked at on."""
ESTIMATED_ON = 8
"""Pictures of each domain that the estimate rests on; each is seen under two dozen shifts."""
ESTIMATED_BY: Split = "val"
"""Split of the source whose labels the estimate is calibrated by."""
CROP = 320
"""Longest side that is cut from the middle of these."""


def beside(recipe: Recipe, *others: Recipe) -> dict[str, Recipe | Path]:
    """The recipes of all networks: what adaptation begins from, the same recalibrated, and the recipes themselves.

    A recipe that starts from another recipe, a run or weights begins from that; any other is given a source-only
    network trained by its own settings.

    Raises:
        RecipeError: a recipe does not adapt, names no target, or does not begin where the others do.
    """
    before = _before(recipe)
    for number, other in enumerate(others, start=2):
        if other in (recipe, *others[: number - 2]):
            raise RecipeError(f"recipe {number} says what another one says; name each recipe once")
        _check_alike(recipe, other, number)
    found: dict[str, Recipe | Path] = {BEFORE: before}
    if not isinstance(recipe.method, Recalibrate):
        found[RECALIBRATED] = Recipe(
            source=recipe.source,
            target=recipe.target,
            start=before,
            model=recipe.model,
            method=Recalibrate(),
            crop=recipe.crop,
            window=recipe.window,
            resize=recipe.resize,
            seed=recipe.seed,
            **RECALIBRATION,
        )
    if not others:
        return {**found, ADAPTED: recipe}
    return found | {f"{ADAPTED} {number}": each for number, each in enumerate((recipe, *others), start=1)}


def _check_alike(recipe: Recipe, other: Recipe, number: int) -> None:
    """Refuse a recipe that cannot be chosen among with the first, by the first setting in which it may not differ.

    Raises:
        RecipeError: it has another source, target, seed, resize, window or start.
    """
    shared = ("source", "target", "seed", "resize", "window")
    one, two = (
        _flat({key: each.model_dump(mode="json")[key] for key in shared} | {"start": _written(_before(each))})
        for each in (recipe, other)
    )
    for key in dict.fromkeys([*one, *two]):
        if one.get(key) != two.get(key):
            alone = key.startswith("start") and recipe.start is None and other.start is None
            do = (
                "without start each begins from source only by its own settings, so write the same start in both"
                if alone
                else "recipes to choose among share source, target, seed, resize, window and start, so change it, or "
                "adapt by it in a command of its own"
            )
            raise RecipeError(
                f"recipe {number} says {said(two.get(key))} for {key}, and the first {said(one.get(key))}; {do}"
            )


def _written(before: Recipe | Path) -> object:
    return before.model_dump(mode="json") if isinstance(before, Recipe) else str(before)


def differences(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """What each of some recipes says otherwise than the rest, by dotted setting."""
    flat = [_flat(recipe.model_dump(mode="json", exclude={"source", "target", "start"})) for recipe in recipes]
    names = list(dict.fromkeys(key for each in flat for key in each))
    apart = [name for name in names if any(each.get(name) != flat[0].get(name) for each in flat)]
    return [{name: each[name] for name in apart if name in each} for each in flat]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _before(recipe: Recipe) -> Recipe | Path:
    """What adaptation by a recipe begins from."""
    if recipe.target is None:
        raise RecipeError("adapt needs the images to adapt to; say where they are under target")
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
) -> tuple[Run, Selection]:
    """Train the networks, look at them without target labels, and recommend one.

    What was trained already, by these or other recipes, is not trained again. The selection, the pictures
    and the recommended network (``best.safetensors``) lie in the folder of the adapted run that stands best: the
    recommended one, else the first that nothing speaks against, else the first. The others get the selection too, and,
    where they were refused, the recommended network.

    Args:
        recipe: of an adapted network.
        others: other ways to adapt from the same start; which is best is said without labels, too.
        out: folder of the runs.
        fabric: launched.
        config: devices, intervals and output.
        gate: what a network must hold; left out, `Gate` by its defaults.
        estimates: whether to estimate each network's mIoU on the target.

    Raises:
        OverflyError: recipes, data or weights do not go together.
    """
    plans = beside(recipe, *others)
    _check_all_can_start([recipe, *others], fabric)
    runs: dict[str, Run | Path] = {}
    for role, plan in plans.items():
        if isinstance(plan, Recipe):
            runs[role] = train_recipe(plan, out, fabric, config)
        else:
            runs[role] = Run.open(plan) if plan.is_dir() else resolve_start(plan)
    ours = {role: run for role, run in runs.items() if role not in (BEFORE, RECALIBRATED) and isinstance(run, Run)}
    selection = run_on_rank_zero(fabric, lambda: _judge(recipe, runs, gate or Gate(), fabric.device, estimates))
    passed = [role for role in ours if not selection.candidates[role].rejections]
    adapted = ours[selection.recommended if selection.recommended in ours else (passed or list(ours))[0]]
    if fabric.is_global_zero:
        for role, run in ours.items():
            _keep(run, selection, runs, best=run is adapted or role not in passed)
        _draw(adapted.path / "samples" / "selection.png", recipe, runs, fabric.device)
        for run in ours.values():
            if run is not adapted:
                (run.path / "samples").mkdir(exist_ok=True)
                shutil.copyfile(adapted.path / "samples" / "selection.png", run.path / "samples" / "selection.png")
    return adapted, selection


def _check_all_can_start(recipes: Sequence[Recipe], fabric: Fabric) -> None:
    """Refuse before the first of the trainings what would be found before the last, or at the selection.

    Raises:
        OverflyError: data, weights or a teacher of a recipe are not there or do not fit; the message says of which.
    """
    for number, recipe in enumerate(recipes, start=1):
        try:
            if recipe.source is not None:
                for split in (recipe.validation.split, ESTIMATED_BY):
                    has_labels(recipe.source, split)
            start = resolve_start(recipe.start) if isinstance(recipe.start, Path) else None
            prepare_training(recipe, fabric, TrainerConfig(quiet=True), start)
        except OverflyError as error:
            if len(recipes) == 1:
                raise
            raise RecipeError(f"recipe {number}: {error}") from error


def _held_out(recipe: Recipe) -> bool:
    """Whether the source has pictures that are not learned from; nobody need have kept any."""
    try:
        held = recipe.validation.split
        return recipe.source is not None and held != "train" and bool(recipe.source.items(held))
    except SplitError:
        return False


def _judge(
    recipe: Recipe, runs: Mapping[str, Run | Path], gate: Gate, device: torch.device, estimates: bool
) -> Selection:
    """Look at every network on the same target pictures, labels taken away."""
    target = recipe.domain("target")
    candidates = {role: _network(run) for role, run in runs.items()}
    sight: dict[str, Any] = {
        "limit": LOOKED_AT, "crop": CROP, "resize": recipe.resize, "window": recipe.window, "device": device
    }  # fmt: skip
    metrics: dict[str, LabelFreeMetrics] = {}
    guesses: dict[str, Estimate] = {}
    for role, network in candidates.items():
        found = label_free_metrics(network, target, "train", reference=candidates[BEFORE], **sight)
        metrics[role] = found.model_copy(update={"source_miou": _source_miou(recipe, runs[role], device)})
        if estimates and recipe.source is not None and has_labels(recipe.source, ESTIMATED_BY):
            guesses[role] = estimate(network, recipe.source, target, **sight | {"limit": ESTIMATED_ON})
    known = taught = None
    if _held_out(recipe):
        source, held = recipe.domain("source"), recipe.validation.split
        known = familiarity(label_free_metrics(candidates[BEFORE], source, held, **sight), metrics[BEFORE])
        if gate.familiar and has_labels(source, "train") and has_labels(source, held):
            taught = reverse_validation(candidates[BEFORE], source, target, held, **sight)
    reasons = gate.refusals(BEFORE, metrics, known, taught)
    ours = {
        role: run.recipe for role, run in runs.items() if role not in (BEFORE, RECALIBRATED) and isinstance(run, Run)
    }
    settings = dict(zip(ours, differences(list(ours.values())), strict=True))
    passed = {role: metrics[role] for role in (BEFORE, *ours, *metrics) if not reasons.get(role)}
    reports = {
        role: CandidateReport(
            run=str(run.path if isinstance(run, Run) else run),
            metrics=metrics[role],
            settings=settings.get(role, {}),
            rejections=reasons.get(role, ()),
            estimate=guesses.get(role),
            truth=_truth(run, recipe),
        )
        for role, run in runs.items()
    }
    return Selection(
        recommended=select(BEFORE, passed, gate.alike),
        candidates=reports,
        gate=gate,
        target=target.model_dump(mode="json"),
        familiarity=known,
        reverse_validation=taught,
        labels_opened=sum(each.labels_opened for each in metrics.values()) + _learned_with_labels(recipe),
    )


def _learned_with_labels(recipe: Recipe) -> int:
    """Target pictures that are the source's too, or that of what it began from: their labels are read as the source's.

    What is no longer there cannot be compared and is not counted.
    """
    labeled_ones: set[object] = set()
    now: Recipe | Path | None = recipe
    while now is not None:
        if isinstance(now, Path):
            with suppress(OverflyError):
                now = Run.open(now).recipe
            if isinstance(now, Path):
                break
        for split in {"train", now.validation.split, ESTIMATED_BY} if now.source is not None else ():
            with suppress(OverflyError):
                labeled_ones |= {_picture(item) for item in now.domain("source").items(split) if item.label}
        now = now.start
    return sum(_picture(item) in labeled_ones for item in recipe.domain("target").items("train"))


def _picture(item: Item) -> object:
    """What two items of one picture have in common: the file, or what draws it and from what."""
    image = item.image
    if isinstance(image, Path):
        return image.resolve()
    return (image.func, repr((image.args, image.keywords))) if isinstance(image, partial) else image


def _network(run: Run | Path) -> Segmenter:
    return run.segmenter() if isinstance(run, Run) else Segmenter.load(run)


def _source_miou(recipe: Recipe, run: Run | Path, device: torch.device) -> float | None:
    """MIoU on the source's held-out labels, of every network as the recipe scores; measured once of a run like it."""
    split = recipe.validation.split
    if recipe.source is None or not has_labels(recipe.source, split):
        return None
    if isinstance(run, Run) and (run.recipe.resize, run.recipe.window) == (recipe.resize, recipe.window):
        found = stored_scores(run, "source", split, recipe.source)
        return (found or evaluate_domain(run, recipe.source, "source", split, device=device)).miou
    network = _network(run)
    return score(network, recipe.source, split, resize=recipe.resize, window=recipe.window or None, device=device).miou


def _truth(run: Run | Path, recipe: Recipe) -> dict[str, float | None]:
    """What ``scores.json`` holds already; nothing is opened for it."""
    if not isinstance(run, Run):
        return {}
    splits: tuple[Split, ...] = ("val", "test")
    found = {}
    for key, domain in (("source", recipe.source), ("target", recipe.target)):
        for split in splits:
            scores = stored_scores(run, key, split, domain) if domain is not None else None
            if scores is not None:
                found[f"{key}/{split}"] = scores.miou
    return found


def _keep(run: Run, selection: Selection, runs: Mapping[str, Run | Path], *, best: bool) -> None:
    """Write the selection into an adapted run's folder and, where it is used or was refused, the recommended network.

    So no folder of a network that would do harm is without one that does not. A network that passed and was not chosen
    keeps what it learned.
    """
    file = run.path / "best.safetensors"
    if best:
        chosen = runs[selection.recommended]
        with atomic_write(file) as part:
            shutil.copyfile(chosen.weights if isinstance(chosen, Run) else chosen, part)
    else:
        file.unlink(missing_ok=True)
    run.write_json("selection.json", selection.model_dump(mode="json"))
    page = run.path / "selection.md"
    with atomic_write(page) as part:
        part.write_text(selection.report(), encoding="utf-8")


def _draw(path: Path, recipe: Recipe, runs: Mapping[str, Run | Path], device: torch.device) -> None:
    """Target pictures as every network sees them; no label is read."""
    target = recipe.domain("target")
    images = list(unlabeled_images(target, "train", limit=4, resize=recipe.resize, crop=CROP))
    rows: dict[str, dict[str, Sample]] = {f"target {place + 1}": {} for place in range(len(images))}
    for role, run in runs.items():
        network = _network(run).to(device)
        with evaluation_mode(network), torch.inference_mode():
            for place, image in enumerate(images):
                ids = predict_scores(network, image.to(device), recipe.window).argmax(0).cpu().numpy().astype(np.uint8)
                name = f"target {place + 1}"
                rows[name][role] = Sample(name, image.permute(1, 2, 0).numpy().astype(_kind(target.max_value)), ids)
    comparison(rows, target.classes, path)


def _kind(max_value: float) -> type[np.generic]:
    """The number type of pictures with this brightest value, so that they are shown in their own range."""
    return np.uint8 if max_value == 255 else np.uint16 if max_value > 1 else np.float32


__all__ = ["adapt", "beside", "differences"]
