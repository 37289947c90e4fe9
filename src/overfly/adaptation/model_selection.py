"""Choosing among runs and their kept checkpoints without target labels; and, for study, how well that went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overfly.adaptation.consensus import consensus
from overfly.adaptation.estimate import Estimate, estimate
from overfly.core.errors import DataError, RecipeError, RunError
from overfly.core.spec import Share, Spec, Whole
from overfly.data.domain import Domain, Split
from overfly.evaluation.images import unlabeled_images
from overfly.evaluation.label_free_metrics import (
    DEFAULT_VALIDATORS,
    VALIDATORS,
    LabelFreeMetrics,
    elect,
    label_free_metrics,
)
from overfly.evaluation.ranking import best, regret, spearman
from overfly.evaluation.scores import Scores
from overfly.models.segmenter import Segmenter, read_segmenter_file
from overfly.training.evaluate import evaluate_domain, has_labels, stored_scores
from overfly.training.run import Run
from overfly.training.validation import logged_source_miou


class Candidate(Spec):
    """One network that could be chosen."""

    run: str
    """Folder of its run."""
    checkpoint: str
    """``step N`` of a kept validation, ``final`` for what the run ended in, or both."""
    metrics: LabelFreeMetrics
    """What can be said of it without target labels."""
    committee: Share
    """Mean rank over the committee's members, 1 for first with all."""
    estimate: Estimate | None = None
    """Estimated target mIoU with its interval, where asked for. Not a measurement."""
    truth: Share | None = None
    """Target mIoU against labels, where a study opened them."""

    @property
    def title(self) -> str:
        """Run and checkpoint as words."""
        return f"{Path(self.run).name}, {self.checkpoint}"


class ValidatorAccuracy(Spec):
    """How far one validator can be trusted, by a study with labels."""

    chosen: str
    """What it chooses; the first of equals."""
    correlation: float | None
    """Spearman's rank correlation of its figure with the true target mIoU; none where one of them is constant."""
    regret: float
    """Best true mIoU of all candidates minus that of the chosen one."""


class Ranking(Spec):
    """Candidates by every validator, and who is chosen."""

    target: dict[str, Any]
    """The target as a recipe names it."""
    split: Split
    """Split of its pictures that were looked at, without labels."""
    members: tuple[str, ...]
    """The committee."""
    candidates: tuple[Candidate, ...]
    """Best of the committee first."""
    chosen: dict[str, str]
    """What each validator chooses, the committee, and, with estimates, the mIoU that calibrated confidences expect: the
    correction for shift, which differs from network to network, is too noisy to rank by."""
    study: dict[str, ValidatorAccuracy] | None = None
    """For each validator, how well it chose; where labels were opened for study."""
    labels_opened: Whole
    """Target labels that true scores rest on, read now or earlier: 0 unless it is a study."""


@dataclass(frozen=True)
class TargetImages:
    """Which pictures of the target are looked at, labels taken away, and where networks run."""

    split: Split = "train"
    """Split of the target."""
    limit: int | None = 24
    """How many, evenly spread."""
    crop: int | None = 512
    """Longest side that is cut from their middle."""
    device: torch.device | str = "cpu"
    """Where networks run."""


@dataclass(frozen=True)
class Place:
    """A network on disk: of a run, at a kept step or its end."""

    run: Run
    step: int | None
    final: bool

    @property
    def checkpoint(self) -> str:
        """As `Candidate` names it."""
        return "final" if self.step is None else f"step {self.step}{', final' if self.final else ''}"


def gather(paths: Sequence[Path | str]) -> list[Run]:
    """The runs that some folders mean: runs, or folders of runs, of which the unfinished are left out.

    Raises:
        RunError: a folder means none.
    """
    found: dict[Path, Run] = {}
    for entry in map(Path, paths):
        folder = not (entry / "recipe.yaml").is_file() and entry.is_dir()
        runs = [Run(file.parent) for file in sorted(entry.glob("*/recipe.yaml"))] if folder else [Run.open(entry)]
        runs = [run for run in runs if run.finished or run.validation_weights]
        if not runs:
            raise RunError(f"{entry} has no trained network to choose from; give finished runs or a folder of them")
        found |= {run.path.resolve(): run for run in runs}
    return list(found.values())


def places(runs: Sequence[Run]) -> list[Place]:
    """Every network of some runs, each once: kept validations in order, then what the run ended in if it is another."""
    found = []
    for run in runs:
        own = [
            Place(run, step, final=run.finished and _same(run.weights, file))
            for step, file in run.validation_weights.items()
        ]
        found += own if any(place.final for place in own) or not run.finished else [*own, Place(run, None, final=True)]
    return found


def _same(one: Path, other: Path) -> bool:
    """Whether two files hold the same weights; their bytes may differ, for what describes them has no order."""
    first, second = (read_segmenter_file(file)[1] for file in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rank(
    runs: Sequence[Run],
    *,
    members: Sequence[str] = DEFAULT_VALIDATORS,
    reference: Run | None = None,
    estimates: bool = False,
    study: bool = False,
    sight: TargetImages = TargetImages(),
) -> Ranking:
    """Rank networks without target labels.

    Args:
        runs: finished, or with kept checkpoints; all of one target.
        members: validators that form the committee.
        reference: a run whose network's predictions all are compared with (agreement), such as source-only.
        estimates: estimate the target mIoU of each too; the source's labels are read for it.
        study: open the target's labels in val, score each network on them, and say how well each validator chose.
        sight: the pictures that are looked at.

    Raises:
        RecipeError: the runs have different targets or none, or a validator is unknown.
        DataError: a study, and the target has no labels.
    """
    _check_members(members)
    target = target_of(runs)
    if study and not has_labels(target, "val"):
        raise DataError(
            f"the target {target.title} has no labels in val, and a study needs them; leave out --with-labels"
        )
    compared = reference.segmenter() if reference is not None else None
    if reference is not None and compared is not None:
        _check_classes(reference, compared, target)
    candidates = places(runs)
    same_source = len({str(run.recipe.source.model_dump(mode="json")) for run in runs if run.recipe.source}) == 1
    metrics, guesses, truths = [], [], []
    for place in candidates:
        network = place.run.segmenter(place.step)
        _check_classes(place.run, network, target)
        found = _looked(place, network, target, sight, compared)
        source = _source_miou(place, sight.device) if same_source else None
        metrics.append(found.model_copy(update={"source_miou": source}))
        guesses.append(_estimated(place, network, target, sight) if estimates else None)
        truths.append(_truth(place, target, sight.device) if study else None)
    metrics = _with_consensus(candidates, metrics, target, sight)
    votes = elect(metrics, members)
    rows = zip(candidates, metrics, votes, guesses, truths, strict=True)
    candidates = [
        Candidate(run=str(place.run.path), checkpoint=place.checkpoint, metrics=figure, committee=vote,
                  estimate=guess, truth=truth and (truth.miou or 0.0))
        for place, figure, vote, guess, truth in rows
    ]  # fmt: skip
    candidates.sort(key=lambda candidate: -candidate.committee)
    columns = _columns(candidates)
    picked = {name: best(column) for name, column in columns.items()}
    return Ranking(
        target=target.model_dump(mode="json"),
        split=sight.split,
        members=tuple(members),
        candidates=tuple(candidates),
        chosen={name: candidates[place].title for name, place in picked.items() if place is not None},
        study=_trust(candidates, columns) if study else None,
        labels_opened=sum(truth.labels_opened for truth in truths if truth is not None),
    )


def write(verdict: Ranking, out: Path) -> Path:
    """Write ``validators.json`` into a folder.

    Raises:
        RecipeError: the folder is a file.
    """
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out} is a file; give a folder to write validators.json to")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "validators.json"
    file.write_text(verdict.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return file


def target_of(runs: Sequence[Run]) -> Domain:
    """The one target of some runs; those without any do not matter.

    Raises:
        RecipeError: they have several, or none.
    """
    found = {str(run.recipe.target.model_dump(mode="json")): run for run in runs if run.recipe.target is not None}
    if not found:
        raise RecipeError("none of these runs has a target to choose for; train with one, under target in the recipe")
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise RecipeError(
            f"{first.path} and {second.path} have different targets, and figures on different pictures do not compare; "
            "validate the runs of one target at a time"
        )
    return next(iter(found.values())).recipe.domain("target")


def _check_members(members: Sequence[str]) -> None:
    unknown = [name for name in members if name not in VALIDATORS]
    if unknown or not members:
        named = f"no validator is called {unknown[0]!r}" if unknown else "a committee needs members"
        raise RecipeError(f"{named}; there are: {', '.join(VALIDATORS)}")


def _check_classes(run: Run, network: Segmenter, target: Domain) -> None:
    if network.classes.names != target.classes.names:
        raise RecipeError(f"{run.path} tells other classes apart than the target {target.title}; leave it out")


def _looked(
    place: Place, network: nn.Module, target: Domain, sight: TargetImages, reference: nn.Module | None
) -> LabelFreeMetrics:
    recipe = place.run.recipe
    return label_free_metrics(
        network, target, sight.split, reference=reference,
        limit=sight.limit, crop=sight.crop, window=recipe.window, resize=recipe.resize, device=sight.device,
    )  # fmt: skip


def _with_consensus(
    candidates: Sequence[Place], metrics: Sequence[LabelFreeMetrics], target: Domain, sight: TargetImages
) -> list[LabelFreeMetrics]:
    """The figures, and how far each network agrees with all together, where all read pictures of one size."""
    resizes = {place.run.recipe.resize for place in candidates}
    if len(resizes) > 1:
        return list(metrics)
    images = list(unlabeled_images(target, sight.split, limit=sight.limit, resize=resizes.pop(), crop=sight.crop))
    loaded = ((place.run.segmenter(place.step), place.run.recipe.window) for place in candidates)
    found = consensus(loaded, images, sight.device)
    return [each.model_copy(update={"consensus": share}) for each, share in zip(metrics, found, strict=True)]


def _estimated(place: Place, network: nn.Module, target: Domain, sight: TargetImages) -> Estimate | None:
    recipe = place.run.recipe
    if recipe.source is None or not has_labels(recipe.source, "val"):
        return None
    return estimate(
        network, recipe.source, target, split=sight.split,
        limit=sight.limit, crop=sight.crop, window=recipe.window, resize=recipe.resize, device=sight.device,
    )  # fmt: skip


def _source_miou(place: Place, device: torch.device | str) -> float | None:
    """What the journal or ``scores.json`` holds; measured where neither does. None without a source."""
    run, source = place.run, place.run.recipe.source
    split = run.recipe.validation.split
    if source is None or not has_labels(source, split):
        return None
    if place.step is not None:
        return logged_source_miou(list(run.log.rows()), place.step)
    return (
        stored_scores(run, "source", split, source) or evaluate_domain(run, source, "source", split, device=device)
    ).miou


def _truth(place: Place, target: Domain, device: torch.device | str) -> Scores:
    """Scores on the target; labels are opened once a network, as ``scores.json`` of its run counts."""
    found = stored_scores(place.run, "target", "val", target, place.step)
    return found or evaluate_domain(place.run, target, "target", "val", device=device, checkpoint=place.step)


def _columns(candidates: Sequence[Candidate]) -> dict[str, list[float | None]]:
    """Every figure that could choose, by its name."""
    columns: dict[str, list[float | None]] = {
        name: [candidate.metrics.by_validator()[name] for candidate in candidates] for name in VALIDATORS
    }
    columns["committee"] = [candidate.committee for candidate in candidates]
    columns["expected"] = [each.estimate.expected if each.estimate else None for each in candidates]
    return {name: column for name, column in columns.items() if all(value is not None for value in column)}


def _trust(candidates: Sequence[Candidate], columns: dict[str, list[float | None]]) -> dict[str, ValidatorAccuracy]:
    truth = [candidate.truth or 0.0 for candidate in candidates]
    found = {}
    for name, column in columns.items():
        place, lost = best(column), regret(column, truth)
        if place is not None and lost is not None:
            correlation = spearman([value or 0.0 for value in column], truth)
            found[name] = ValidatorAccuracy(chosen=candidates[place].title, correlation=correlation, regret=lost)
    return found


__all__ = [
    "Candidate",
    "Ranking",
    "TargetImages",
    "ValidatorAccuracy",
    "gather",
    "places",
    "rank",
    "target_of",
    "write",
]
