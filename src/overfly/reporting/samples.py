"""Collect the sample images of a report, and draw those of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from overfly.core.classes import Classes
from overfly.core.errors import DataError, RunError
from overfly.core.records import UInt8
from overfly.data.domain import Domain, Split, split_items
from overfly.evaluation.images import MetricOptions, predict_scores, unlabeled_images
from overfly.evaluation.panels import confusion_figure, samples_figure
from overfly.evaluation.score import Sample, Samples, evaluation_mode, score
from overfly.evaluation.scores import Scores
from overfly.reporting.figures import draw_curves, thumbnail
from overfly.training.evaluate import Role, has_labels, record_opened_labels
from overfly.training.run import Run

SPLIT: Split = "val"
"""The split whose labels are read."""
SIDE = 320
"""Longest side of stored sample images, in pixels."""
UNLABELED = 4
"""Number of sample images without labels."""


@dataclass(frozen=True, eq=False)
class SampleImage:
    """A downscaled image (h, w, 3) with its label (h, w), if any, and the class ids (h, w) that each network predicts.

    ``reason`` is that of the choice, such as "worst"; ``accuracy`` the share of labeled pixels that each network
    predicts correctly.
    """

    name: str
    reason: str
    image: UInt8
    label: UInt8 | None
    predictions: Mapping[str, UInt8]
    accuracy: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class SampleSet:
    """Sample images of a domain, in this role of the recipes, with the predictions of several networks.

    Attributes:
        candidates: number of images to choose from.
        labels_opened: labels read for the choice, summed over networks.
        note: reason for missing labels or images; otherwise empty.
    """

    title: str
    classes: Classes
    role: Role
    images: Sequence[SampleImage]
    candidates: int
    labels_opened: int
    note: str = ""


def collect_samples(
    runs: Mapping[str, Run], role: Role, *, labels: bool = True, limit: int = 60, device: torch.device | str = "cpu"
) -> SampleSet:
    """Collect the worst and best images of the last network, and its largest gain and loss against the first.

    The finished ``runs``, by title, have the same domain in this role. ``labels`` reads those of its val split; each
    run's scores.json counts them. ``limit`` is the number of images to choose from, evenly sampled. Returns the images;
    if the domain cannot be read, none and a note of the reason.
    """
    domain = next(iter(runs.values())).recipe.domain(role)
    try:
        if labels and has_labels(domain, SPLIT):
            return _labeled_samples(runs, role, domain, limit, device)
        note = "labels were not opened" if not labels else f"there are no labels in {SPLIT}"
        return _unlabeled_samples(runs, role, domain, device, note)
    except DataError as error:
        return SampleSet(domain.title, domain.classes, role, (), 0, 0, str(error))


def _labeled_samples(
    runs: Mapping[str, Run], role: Role, domain: Domain, limit: int, device: torch.device | str
) -> SampleSet:
    stride = -(-sum(item.label is not None for item in domain.items(SPLIT)) // limit)
    samples: dict[str, dict[int, Sample]] = {}
    for name, run in runs.items():
        downscaled = samples[name] = dict[int, Sample]()

        def store(sample: Sample, index: int, _total: int, into: dict[int, Sample] = downscaled) -> None:
            label = None if sample.label is None else thumbnail(sample.label, SIDE)
            image, prediction = thumbnail(sample.image, SIDE), thumbnail(sample.prediction, SIDE)
            into[index] = Sample(sample.name, image, prediction, label, sample.accuracy)

        score(
            run.segmenter(), domain, SPLIT, resize=run.recipe.resize, window=run.recipe.window, device=device,
            samples=store, shard=(0, stride), all_reduce=lambda counts: counts,
        )  # fmt: skip
        record_opened_labels(run, role, SPLIT, len(downscaled))
    accuracy = {name: {index: each.accuracy for index, each in by_index.items()} for name, by_index in samples.items()}
    images = []
    for index, reason in choose_images(accuracy).items():
        shown = {name: by_index[index] for name, by_index in samples.items()}
        first = next(iter(shown.values()))
        predictions = {name: sample.prediction for name, sample in shown.items()}
        correct = {name: sample.accuracy for name, sample in shown.items() if sample.accuracy is not None}
        images.append(SampleImage(first.name, reason, first.image, first.label, predictions, correct))
    opened = [len(by_index) for by_index in samples.values()]
    return SampleSet(domain.title, domain.classes, role, images, opened[0], sum(opened))


def choose_images(accuracy: Mapping[str, Mapping[int, float | None]]) -> dict[int, str]:
    """Choose the two worst and two best images of the last network, and its largest gain and loss against the first.

    ``accuracy`` is that by network and image, None without labeled pixels. Returns the reasons by image, in the order
    to show.
    """
    names = list(accuracy)
    last = {index: value for index, value in accuracy[names[-1]].items() if value is not None}
    ordered = sorted(last, key=lambda index: (last[index], index))
    reasons: dict[int, list[str]] = {}
    for index in ordered[:2]:
        reasons.setdefault(index, []).append("worst")
    for index in [index for index in ordered[::-1][:2] if index not in reasons]:
        reasons.setdefault(index, []).append("best")
    if last and len(names) > 1:
        first = accuracy[names[0]]
        gains = {index: value - (first.get(index) or 0.0) for index, value in last.items()}
        most, least = max(gains, key=lambda index: gains[index]), min(gains, key=lambda index: gains[index])
        if gains[most] >= 0.005:
            reasons.setdefault(most, []).append(f"largest gain, {100 * gains[most]:+.0f} points")
        if gains[least] <= -0.005:
            reasons.setdefault(least, []).append(f"largest loss, {100 * gains[least]:+.0f} points")
    return {index: ", ".join(words) for index, words in reasons.items()}


def _unlabeled_samples(
    runs: Mapping[str, Run], role: Role, domain: Domain, device: torch.device | str, note: str
) -> SampleSet:
    recipe = next(iter(runs.values())).recipe
    split: Split = SPLIT if split_items(domain, SPLIT) else "train"
    images = list(unlabeled_images(domain, split, MetricOptions(UNLABELED, crop=1024, resize=recipe.resize)))
    predictions: list[dict[str, UInt8]] = [{} for _ in images]
    for name, run in runs.items():
        network = run.segmenter().to(device)
        with evaluation_mode(network), torch.inference_mode():
            for index, image in enumerate(images):
                ids = predict_scores(network, image.to(device), recipe.window).argmax(0).cpu().numpy().astype(np.uint8)
                predictions[index][name] = thumbnail(ids, SIDE)
    result = []
    for index, image in enumerate(images):
        values = image.permute(1, 2, 0).numpy()
        shown = thumbnail(values.astype(np.uint8) if domain.max_value == 255 else values, SIDE)
        result.append(SampleImage(f"{domain.title} {index + 1}", "", shown, None, predictions[index], {}))
    return SampleSet(domain.title, domain.classes, role, result, len(images), 0, note)


def samples_folder(run: Run) -> Path:
    """Create the folder of a run's sample images; raise `RunError` if a file has this name."""
    folder = run.path / "samples"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, not a folder for sample images; move it away")
    folder.mkdir(exist_ok=True)
    return folder


def draw_samples(run: Run, name: str, domain: Domain, scores: Scores, samples: Samples) -> list[Path]:
    """Draw the training curves, the confusion matrix and, last, panels into a run's folder.

    ``name`` is the stem of the files, such as target-val.
    """
    folder = samples_folder(run)
    return [
        draw_curves(list(run.log.rows()), folder / "curves.png"),
        confusion_figure(scores.confusion, domain.classes, folder / f"{name}-confusion.png"),
        samples_figure(samples, domain.classes, folder / f"{name}.png"),
    ]
