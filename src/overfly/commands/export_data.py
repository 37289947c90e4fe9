"""Data of an export, from a run: images and labels for the comparison, and the content of the model card."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from overfly.commands.arguments import load_domain
from overfly.commands.load_predictor import NetworkFolder
from overfly.core.choices import Split
from overfly.core.errors import DataError, RecipeError, RunError
from overfly.data.datasets import Dataset
from overfly.data.domain import Domain, sample_evenly, split_items, without_labels
from overfly.evaluation.images import to_tensor
from overfly.evaluation.scores import valid_scores
from overfly.exporting.exporter import EvaluationData, ExportReport, LabeledSplit
from overfly.exporting.hub import CardContent
from overfly.exporting.predictor import ExportSettings, Floats, ModelMetadata
from overfly.ops.windows import cut_window, window_grid
from overfly.recipe import Recipe
from overfly.training.evaluate import has_labels, record_opened_labels
from overfly.training.run import Run

CALIBRATION = 32
"""Number of calibration images for 8-bit quantization."""


def export_domain(folder: NetworkFolder, text: str, metadata: ModelMetadata) -> Domain:
    """Return the domain for the comparison, and check its classes and bands."""
    recipe = None if folder.run is None else folder.run.recipe
    domains = (recipe.target, recipe.source) if recipe else ()
    order = domains if text == "target" else domains[::-1]
    own = next((domain for domain in order if domain is not None), None)
    domain = own if text in ("target", "source") else load_domain(text)
    if domain is None:
        raise DataError(f"{folder.path} has no domain to compare on; give one as --domain")
    if domain.classes.names != metadata.classes.names or domain.bands != metadata.bands:
        raise RecipeError(
            f"the domain {domain.title} has other classes or bands than the network; give one with "
            f"{', '.join(metadata.classes.names)} and {metadata.bands} bands as --domain"
        )
    return domain


def evaluation_data(
    domain: Domain, recipe: Recipe | None, settings: ExportSettings, window: int, images: int, *, labels: bool
) -> EvaluationData:
    """Return unlabeled images of a domain, and the labeled split for scoring."""
    resize = None if settings.resize or recipe is None else recipe.resize
    split: Split = "val" if split_items(domain, "val") else "train" if split_items(domain, "train") else "test"
    calibrated: Split = "train" if split_items(domain, "train") else split
    labeled = labels and has_labels(domain, "val")
    return EvaluationData(
        images=list(patches(domain, split, images, window)),
        calibration=list(patches(domain, calibrated, CALIBRATION, window)) if settings.precision == "int8" else [],
        labels=LabeledSplit(domain, "val", resize, None if settings.resize else window, images) if labeled else None,
        title=f"{domain.title} ({split})",
    )


def patches(domain: Domain, split: Split, limit: int, side: int) -> Iterator[Floats]:
    """Yield square patches (1, C, side, side), float32, in the sensor's own range, of a split's images, without labels.

    There are ``limit`` patches, evenly sampled over and within images; smaller images are padded by repeating their
    border.
    """
    items = sample_evenly(without_labels(split_items(domain, split)), limit)
    if not items:
        raise DataError(f"the domain {domain.title} has no images to compare on; give another as --domain")
    for index, item in enumerate(items):
        image = to_tensor(domain.read_image(item))
        positions = window_grid(image.shape[-2], image.shape[-1], side, 0.0)
        count = min(limit * (index + 1) // len(items) - limit * index // len(items), len(positions))
        for number in range(count):
            window = positions[int((number + 0.5) * len(positions) / count)]
            yield np.ascontiguousarray(cut_window(image, window, side)[None].numpy(), np.float32)


def record_labels(run: Run | None, name: str, domain: Domain, report: ExportReport) -> None:
    """Add the labels opened to compare mIoU to the run's counts in scores.json, by role or ``name`` of the domain."""
    opened = max((parity.labels_opened for parity in report.parity), default=0)
    if run is None or not opened:
        return
    role = next((role for role in ("target", "source") if getattr(run.recipe, role) is domain), name)
    for _ in range(1 + len(report.parity)):
        record_opened_labels(run, role, "val", opened)


def card_content(folder: NetworkFolder) -> CardContent:
    """Return the content of a model card: domains, scores of the run and of its other seeds, and the selection."""
    selection, run = folder.selection, folder.run
    if run is None:
        method = "unknown; the run of the recommended network was deleted"
        return CardContent(folder.path.name, method, [], selection=selection)
    recipe = run.recipe
    target_role = "without labels, adapted to" if recipe.method.needs_target else "not seen in training"
    domains = []
    for domain, role in ((recipe.source, "with labels, used in training"), (recipe.target, target_role)):
        if domain is not None:
            sheet = (inspect.getdoc(type(domain)) or "").split("* ")[1:]
            if isinstance(domain, Dataset):
                sheet = [f"{key.capitalize()}: {fact}" for key, fact in domain.sheet().facts.items()]
            domains.append((domain.title, f"({role}). {' '.join(' '.join(sheet).split())}"))
    return CardContent(
        title=run.path.name,
        method=f"`{recipe.method.name}`: {(inspect.getdoc(type(recipe.method)) or '').splitlines()[0].rstrip('.')}",
        domains=domains, scores=_scores_of_seeds(run), selection=selection,
        recipe=yaml.safe_dump(_without_paths(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
    )  # fmt: skip


def _scores_of_seeds(run: Run) -> dict[str, dict[int, dict[str, float | None]]]:
    """Return mIoU and IoU of a run and of runs that differ only in the seed, by domain and split, then by seed."""
    result: dict[str, dict[int, dict[str, float | None]]] = {}
    reference = _without_seeds(run.recipe.model_dump(mode="json"))
    for file in sorted(run.path.parent.glob("*/recipe.yaml")):
        sibling = Run(file.parent)
        try:
            recipe = sibling.recipe
            if file.parent != run.path and _without_seeds(recipe.model_dump(mode="json")) != reference:
                continue
            scores = valid_scores(sibling.scores)
        except RunError:
            continue
        for key, scored in scores.items():
            classes = {name: score.iou for name, score in scored.classes.items()}
            result.setdefault(key, {})[recipe.seed] = {"mIoU": scored.miou, **classes}
    return result


def _without_seeds(values: Any) -> Any:
    """Return a recipe's values without the seeds of training, at any depth of ``start``."""
    if isinstance(values, dict):
        pairs = [(key, value) for key, value in values.items() if key not in ("seed", "weights")]
        return {key: _without_seeds(value) if key == "start" else value for key, value in pairs}
    return None if isinstance(values, str) else values


def _without_paths(values: Any) -> Any:
    """Return a recipe's values with absolute paths reduced to their names."""
    if isinstance(values, dict):
        return {key: _without_paths(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_paths(value) for value in values]
    return Path(values).name if isinstance(values, str) and values.startswith("/") else values
