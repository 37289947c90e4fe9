"""The pictures of a report: where networks are worst and best, and where they differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from overfly.core.errors import DataError
from overfly.core.records import UInt8
from overfly.data.domain import Domain, Split, SplitError
from overfly.evaluation.images import predict_scores, unlabeled_images
from overfly.evaluation.samples import Sample
from overfly.evaluation.score import evaluation_mode, score
from overfly.reporting.embedded import small, small_picture
from overfly.training.evaluate import Role, has_labels, record_opened_labels
from overfly.training.run import Run

SPLIT: Split = "val"
"""The split whose labels are opened."""
KEPT = 320
"""Longest side that pictures are kept with, in pixels."""
WITHOUT_LABELS = 4
"""Pictures shown where there are no labels."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture, its label, and what every network says of it, all small.

    Attributes:
        name: the item's name.
        why: what it was chosen for, such as "worst".
        picture: (h, w, 3).
        label: class ids (h, w); None where nobody opened one.
        maps: class ids (h, w) by network.
        accuracy: share of labeled pixels that are right, by network.
    """

    name: str
    why: str
    picture: UInt8
    label: UInt8 | None
    maps: Mapping[str, UInt8]
    accuracy: Mapping[str, float]


@dataclass(eq=False)
class Shelf:
    """Keeps every picture that it is shown, small."""

    kept: dict[int, Sample] = field(default_factory=dict)

    def show(self, sample: Sample, index: int, total: int) -> None:
        """Keep a picture. See `overfly.evaluation.samples.SampleCollector`."""
        del total
        label = None if sample.label is None else small(sample.label, KEPT)
        self.kept[index] = Sample(
            sample.name, small_picture(sample.image, KEPT), small(sample.prediction, KEPT), label, sample.accuracy
        )


@dataclass(frozen=True, eq=False)
class Album:
    """Pictures of one domain with what some networks say.

    Attributes:
        title: the domain's.
        role: source or target, as the runs' recipes have it.
        scenes: what was chosen.
        looked_at: pictures it was chosen from.
        opened: labels that were read for it, all networks together; 0 without labels.
        note: why there are no labels or no pictures; empty otherwise.
    """

    title: str
    role: Role
    scenes: Sequence[Scene]
    looked_at: int
    opened: int
    note: str = ""


def album(
    runs: Mapping[str, Run], role: Role, *, labels: bool = True, limit: int = 60, device: torch.device | str = "cpu"
) -> Album:
    """Pictures of a domain where the last of some networks is worst and best, and where it differs most from the first.

    Args:
        runs: finished runs by the name to show, which have the same domain in this role.
        role: whose pictures, source or target.
        labels: open the labels of the domain's val split; every run's ``scores.json`` counts it.
        limit: pictures to look at, evenly spread.
        device: where the networks run.

    Returns:
        The pictures; none, with a note that says why, where the domain's files cannot be read.
    """
    first = next(iter(runs.values()))
    domain = first.recipe.domain(role)
    try:
        if labels and has_labels(domain, SPLIT):
            return _judged(runs, role, domain, limit, device)
        note = "labels were not opened" if not labels else f"there are no labels in {SPLIT}"
        return _plain(runs, role, domain, device, note)
    except DataError as error:
        return Album(domain.title, role, (), 0, 0, str(error))


def _judged(runs: Mapping[str, Run], role: Role, domain: Domain, limit: int, device: torch.device | str) -> Album:
    total = sum(item.label is not None for item in domain.items(SPLIT))
    every = -(-total // limit)
    shelves: dict[str, Shelf] = {}
    opened = 0
    for name, run in runs.items():
        shelves[name] = Shelf()
        recipe = run.recipe
        score(
            run.segmenter(), domain, SPLIT, resize=recipe.resize, window=recipe.window, device=device,
            samples=shelves[name], shard=(0, every), add=lambda counts: counts,
        )  # fmt: skip
        record_opened_labels(run, role, SPLIT, len(shelves[name].kept))
        opened += len(shelves[name].kept)
    chosen = choose(
        {name: {place: one.accuracy for place, one in shelf.kept.items()} for name, shelf in shelves.items()}
    )
    scenes = []
    for place, why in chosen.items():
        seen = {name: shelf.kept[place] for name, shelf in shelves.items()}
        one = next(iter(seen.values()))
        scenes.append(
            Scene(
                one.name,
                why,
                one.image,
                one.label,
                {name: sample.prediction for name, sample in seen.items()},
                {name: sample.accuracy for name, sample in seen.items() if sample.accuracy is not None},
            )
        )
    return Album(domain.title, role, scenes, len(next(iter(shelves.values())).kept), opened)


def choose(accuracy: Mapping[str, Mapping[int, float | None]], number: int = 2) -> dict[int, str]:
    """Which pictures to show, and why: worst and best for the last network, most gained and lost against the first.

    Args:
        accuracy: by network and picture; None where no pixel has a label.
        number: worst and best pictures each.

    Returns:
        Pictures in the order to show, each once.
    """
    names = list(accuracy)
    last = {place: value for place, value in accuracy[names[-1]].items() if value is not None}
    ordered = sorted(last, key=lambda place: (last[place], place))
    found: dict[int, list[str]] = {}
    for place in ordered[:number]:
        found.setdefault(place, []).append("worst")
    for place in [place for place in ordered[::-1][:number] if place not in found]:
        found.setdefault(place, []).append("best")
    if last and len(names) > 1:
        before = accuracy[names[0]]
        gains = {place: value - (before.get(place) or 0.0) for place, value in last.items()}
        most, least = max(gains, key=lambda place: gains[place]), min(gains, key=lambda place: gains[place])
        if gains[most] > 0:
            found.setdefault(most, []).append(f"most gained, {100 * gains[most]:+.0f} points")
        if gains[least] < 0:
            found.setdefault(least, []).append(f"most lost, {100 * gains[least]:+.0f} points")
    return {place: ", ".join(why) for place, why in found.items()}


def _plain(runs: Mapping[str, Run], role: Role, domain: Domain, device: torch.device | str, note: str) -> Album:
    """A few pictures without labels."""
    recipe = next(iter(runs.values())).recipe
    try:
        found = bool(domain.items(SPLIT))
    except SplitError:
        found = False
    images = list(
        unlabeled_images(domain, SPLIT if found else "train", limit=WITHOUT_LABELS, resize=recipe.resize, crop=1024)
    )
    maps: list[dict[str, UInt8]] = [{} for _ in images]
    for name, run in runs.items():
        network = run.segmenter().to(device)
        with evaluation_mode(network), torch.inference_mode():
            for place, image in enumerate(images):
                ids = predict_scores(network, image.to(device), recipe.window).argmax(0).cpu().numpy().astype(np.uint8)
                maps[place][name] = small(ids, KEPT)
    scenes = []
    for place, image in enumerate(images):
        shown = image.permute(1, 2, 0).numpy()
        eight = shown.astype(np.uint8) if domain.max_value == 255 else shown
        scenes.append(Scene(f"{domain.title} {place + 1}", "", small_picture(eight, KEPT), None, maps[place], {}))
    return Album(domain.title, role, scenes, len(images), 0, note)


__all__ = ["Album", "Scene", "Shelf", "album", "choose"]
