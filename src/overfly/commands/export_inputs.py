"""Inputs of an export from a run: images and labels to compare on, and the content of the model card."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from overfly.adaptation.selection import Selection
from overfly.commands.arguments import load_domain
from overfly.commands.load_predictor import NetworkFolder
from overfly.core.choices import Split
from overfly.core.errors import DataError, RecipeError, RunError
from overfly.core.records import Item
from overfly.data.domain import Domain, SplitError, sample_evenly, without_labels
from overfly.evaluation.images import to_tensor
from overfly.exporting.exporter import EvaluationData, ExportReport
from overfly.exporting.hub import CardContent, CardDomain
from overfly.exporting.parity import LabeledSplit
from overfly.exporting.predictor import ExportSettings, Floats, ModelMetadata
from overfly.ops.windows import cut, windows
from overfly.recipe import Recipe
from overfly.training.evaluate import has_labels
from overfly.training.run import Run

CALIBRATION = 32
"""Unlabeled target images on which the value ranges of 8-bit networks are measured."""


def export_domain(folder: NetworkFolder, text: str, metadata: ModelMetadata) -> Domain:
    """Return the domain to compare on; it must have the network's classes and bands."""
    recipe = None if folder.run is None else folder.run.recipe
    domains = (recipe.target, recipe.source) if recipe else ()
    order = domains if text == "target" else domains[::-1]
    own = next((domain for domain in order if domain is not None), None)
    found = own if text in ("target", "source") else load_domain(text)
    if found is None:
        raise DataError(f"{folder.path} has no domain to compare on; give one as --domain")
    if found.classes.names != metadata.classes.names or found.bands != metadata.bands:
        raise RecipeError(
            f"the domain {found.title} has other classes or bands than the network; give one with "
            f"{', '.join(metadata.classes.names)} and {metadata.bands} bands as --domain"
        )
    return found


def evaluation_data(
    domain: Domain, recipe: Recipe | None, settings: ExportSettings, window: int, images: int, *, labels: bool
) -> EvaluationData:
    """Return unlabeled images of a domain, and the labeled split for scoring."""
    before = None if settings.resize or recipe is None else recipe.resize
    side = None if settings.resize else window
    shown: Split = "val" if _images(domain, "val") else "train" if _images(domain, "train") else "test"
    measured: Split = "train" if _images(domain, "train") else shown
    calibration: list[Floats] = []
    if settings.precision == "int8":
        calibration = list(patches(domain, measured, CALIBRATION, window))
    labeled_split = None
    if labels and has_labels(domain, "val"):
        labeled_split = LabeledSplit(domain, "val", before, side, images)
    return EvaluationData(
        images=list(patches(domain, shown, images, side or window)),
        calibration=calibration,
        labels=labeled_split,
        title=f"{domain.title} ({shown})",
    )


def patches(domain: Domain, split: Split, limit: int, side: int) -> Iterator[Floats]:
    """Yield square patches of a split's images, evenly sampled over and within images, without labels.

    Args:
        domain: the domain.
        split: the split.
        limit: number of patches.
        side: side of a patch in pixels; smaller images are padded by repeating their border.

    Yields:
        (1, C, side, side), float32, in the sensor's own range.

    Raises:
        DataError: the split has no images.
    """
    items = sample_evenly(_images(domain, split), limit)
    if not items:
        raise DataError(f"the domain {domain.title} has no images to compare on; give another as --domain")
    for index, item in enumerate(items):
        image = to_tensor(domain.read_image(item))
        found = windows(image.shape[-2], image.shape[-1], side, 0.0)
        share = limit * (index + 1) // len(items) - limit * index // len(items)
        count = min(share, len(found))
        for at in range(count):
            window = found[int((at + 0.5) * len(found) / count)]
            yield np.ascontiguousarray(cut(image, window, side)[None].numpy(), np.float32)


def _images(domain: Domain, split: Split) -> list[Item]:
    try:
        return without_labels(domain.items(split))
    except SplitError:
        return []


def record_labels(run: Run, key: str, found: ExportReport) -> None:
    """Add the labels opened to compare mIoU to the run's counts in scores.json."""
    opened = max((each.labels_opened for each in found.parity), default=0)
    if not opened:
        return
    scores = run.scores
    counts = scores.setdefault("labels_opened", {}).setdefault(f"{key}/val", {"times": 0, "images": 0})
    times = 1 + len(found.parity)
    counts["times"] += times
    counts["images"] += times * opened
    run.write_json("scores.json", scores)


def card_content(folder: NetworkFolder) -> CardContent:
    """Return the content of a model card: domains, scores of the run and of its other seeds, and the selection."""
    selection = _selection_text(folder.selection)
    if folder.run is None:
        return CardContent(
            title=folder.path.name,
            method="unknown: the run of the recommended network does not exist any more",
            domains=[],
            selection=selection,
        )
    run, recipe = folder.run, folder.run.recipe
    domains = []
    for domain, role in (
        (recipe.source, "with labels, used in training"),
        (recipe.target, "without labels, adapted to"),
    ):
        if domain is not None:
            domains.append(CardDomain(domain.title, data_sheet(domain), role))
    if recipe.target is not None and not recipe.method.needs_target:
        domains[-1] = CardDomain(recipe.target.title, data_sheet(recipe.target), "not seen in training")
    return CardContent(
        title=run.path.name,
        method=f"`{recipe.method.name}`: {(inspect.getdoc(type(recipe.method)) or '').splitlines()[0].rstrip('.')}",
        domains=domains,
        scores=scores_of_seeds(run),
        selection=selection,
        recipe=yaml.safe_dump(_without_paths(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
    )


def data_sheet(domain: Domain) -> list[str]:
    """Return the entries of a domain's data sheet."""
    text = inspect.getdoc(type(domain)) or ""
    return [" ".join(entry.split()) for entry in text.split("* ")[1:]]


def scores_of_seeds(run: Run) -> dict[str, dict[int, dict[str, float | None]]]:
    """Return mIoU and IoU of a run and of runs that differ in the seed alone, by domain and split, then by seed."""
    found: dict[str, dict[int, dict[str, float | None]]] = {}
    plain = _unseeded(run.recipe.model_dump(mode="json"))
    for file in sorted(run.path.parent.glob("*/recipe.yaml")):
        sibling = Run(file.parent)
        try:
            recipe = sibling.recipe
            if file.parent != run.path and _unseeded(recipe.model_dump(mode="json")) != plain:
                continue
            scores = sibling.scores
        except RunError:
            continue
        for key, value in scores.items():
            if isinstance(value, dict) and "miou" in value:
                classes = {name: each.get("iou") for name, each in value.get("classes", {}).items()}
                found.setdefault(key, {})[recipe.seed] = {"mIoU": value["miou"], **classes}
    return found


def _unseeded(values: Any) -> Any:
    """Return a recipe's values without the seeds of training, at any depth of ``start``."""
    if isinstance(values, dict):
        keep = {key: value for key, value in values.items() if key not in ("seed", "weights")}
        return {key: _unseeded(value) if key == "start" else value for key, value in keep.items()}
    return None if isinstance(values, str) else values


def _selection_text(selection: Selection | None) -> str:
    """Return summary, candidates and differing settings of a selection as Markdown; empty without one."""
    if selection is None:
        return ""
    summary = f"{selection.summary[0].upper()}{selection.summary[1:]}. Target labels opened: {selection.labels_opened}."
    differences = "\n".join(f"- {line}" for line in selection.differences)
    return "\n\n".join(filter(None, [summary, selection.table(), differences]))


def _without_paths(values: Any) -> Any:
    """Return a recipe's values with absolute paths reduced to their last part."""
    if isinstance(values, dict):
        return {key: _without_paths(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_paths(value) for value in values]
    return Path(values).name if isinstance(values, str) and values.startswith("/") else values
