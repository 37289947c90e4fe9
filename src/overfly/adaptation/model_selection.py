"""Rank runs and their kept checkpoints without target labels; optionally evaluate the ranking with labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overfly.adaptation.estimate import Estimate, estimate
from overfly.core.atomic_files import write_text
from overfly.core.errors import DataError, RecipeError, RunError
from overfly.core.progress import print_status
from overfly.core.spec import NonNegativeInt, Share, Spec
from overfly.data.domain import Domain, Split
from overfly.evaluation import label_free_metrics as unlabeled
from overfly.evaluation.images import MetricOptions, unlabeled_images
from overfly.evaluation.label_free_metrics import VALIDATORS, LabelFreeMetrics, Validator
from overfly.evaluation.perturbations import geometric_perturbations
from overfly.evaluation.scores import Scores
from overfly.models.checkpoints import weights_sha256
from overfly.models.segmenter import Segmenter
from overfly.ops.geometry import Dihedral
from overfly.training.evaluate import evaluate_domain, has_labels, logged_source_miou, stored_scores
from overfly.training.run import Run

DEFAULT_VALIDATORS: tuple[Validator, ...] = ("score",)
"""Validators of the mean rank: the rule of `overfly adapt`, chosen on 21 comparisons
(docs/results/choice.md)."""

PERTURBED = frozenset({"masked", "masked_miou", "views", "views_miou"})
"""Validators that need predictions under all perturbations; computed only if a ranking or its study names them."""


class Candidate(Spec):
    """A network to choose from."""

    run: str
    """Its run folder."""
    checkpoint: str
    """``step N`` for a kept checkpoint, ``final`` for the run's network, or both."""
    metrics: LabelFreeMetrics
    """Label-free metrics on the target."""
    mean_rank: Share
    """Mean rank over the validators: 1 if first by all, 0 if last by all."""
    estimate: Estimate | None = None
    """Estimated target mIoU with its interval, if requested; not a measurement."""
    target_miou: Share | None = None
    """Target mIoU from labels, if they were read."""

    @property
    def title(self) -> str:
        """Run folder name and checkpoint."""
        return f"{Path(self.run).name}, {self.checkpoint}"


class ValidatorQuality(Spec):
    """Quality of a validator's ranking, computed with target labels."""

    best: str
    """Candidate with the highest value; the first of equals."""
    correlation: float | None
    """Spearman's rank correlation with target mIoU; none if either is constant."""
    regret: float
    """Highest target mIoU of all candidates minus that of its highest candidate."""


class Ranking(Spec):
    """Candidates, ranked by the mean rank over validators."""

    target: dict[str, Any]
    """The target, as in a recipe."""
    split: Split
    """Split of its images that metrics were computed on, without labels."""
    validators: tuple[str, ...]
    """Validators of the mean rank."""
    candidates: tuple[Candidate, ...]
    """Highest mean rank first."""
    best: dict[str, str]
    """Highest candidate by each validator, by mean rank and, with estimates, by expected mIoU before the correction for
    shift, which is too noisy to rank by."""
    quality: dict[str, ValidatorQuality] | None = None
    """Quality of each validator, if target labels were read."""
    labels_opened: NonNegativeInt
    """Target labels behind the target mIoUs, read now or earlier; 0 without labels."""


@dataclass(frozen=True)
class Checkpoint:
    """A network on disk: of a run, at a kept step or its end."""

    run: Run
    step: int | None
    final: bool

    @property
    def name(self) -> str:
        """See `Candidate.checkpoint`."""
        return "final" if self.step is None else f"step {self.step}{', final' if self.final else ''}"

    def options(self, options: MetricOptions) -> MetricOptions:
        """Return the options with the recipe's window and resize."""
        return replace(options, window=self.run.recipe.window, resize=self.run.recipe.resize)


def find_trained_runs(paths: Sequence[Path | str]) -> list[Run]:
    """Find the runs with weights in run folders or folders of runs; raise `RunError` for a folder without any."""
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        folder = not (path / "recipe.yaml").is_file() and path.is_dir()
        below = [Run(file.parent) for file in sorted(path.glob("*/recipe.yaml"))] if folder else [Run.open(path)]
        trained = [run for run in below if run.finished or run.validation_weights]
        if not trained:
            raise RunError(f"{path} has no trained network; give finished runs or a folder of them")
        runs |= {run.path.resolve(): run for run in trained}
    return list(runs.values())


def list_checkpoints(runs: Sequence[Run]) -> list[Checkpoint]:
    """List each network of the runs once: kept checkpoints in order, then the final one if it differs."""
    checkpoints = []
    for run in runs:
        stored = [
            Checkpoint(run, step, final=run.finished and weights_sha256(run.weights) == weights_sha256(file))
            for step, file in run.validation_weights.items()
        ]
        if run.finished and not any(checkpoint.final for checkpoint in stored):
            stored.append(Checkpoint(run, None, final=True))
        checkpoints += stored
    return checkpoints


def rank(
    runs: Sequence[Run], *, validators: Sequence[str] = DEFAULT_VALIDATORS, reference: Run | None = None,
    estimates: bool = False, with_labels: bool = False, split: Split = "train",
    options: MetricOptions = MetricOptions(crop=512), quiet: bool = True,
) -> Ranking:  # fmt: skip
    """Rank the networks of runs without target labels; the arguments are those of `overfly.rank`.

    Runs are finished or have kept checkpoints, and share a target. Validators under all perturbations need 2.5 times as
    many predictions. Window and resize of the options are replaced by those of each run's recipe. Raises `RecipeError`:
    the runs have several targets or none, or a validator is unknown, and `DataError`: ``with_labels`` for a target
    without labels.
    """
    unknown = [name for name in validators if name not in VALIDATORS]
    if unknown or not validators:
        raise RecipeError(f"--validators must be of {', '.join(VALIDATORS)}; got {unknown[0] if unknown else 'none'}")
    target = shared_target(runs)
    if with_labels and not has_labels(target, "val"):
        raise DataError(f"the target {target.title} has no labels in val; leave out --with-labels")
    other = None if reference is None else reference.segmenter()
    if reference is not None and other is not None:
        _check_classes(reference, other, target)
    checkpoints = list_checkpoints(runs)
    same_source = len({str(run.recipe.source.model_dump(mode="json")) for run in runs if run.recipe.source}) == 1
    turned = all(any(isinstance(entry, Dihedral) for entry in run.recipe.augment) for run in runs)
    every = with_labels or not PERTURBED.isdisjoint(validators)
    perturbations = None if every else geometric_perturbations(turns=turned)
    metrics, estimated, scored = [], [], []
    for number, checkpoint in enumerate(checkpoints, start=1):
        title = f"{checkpoint.run.path.name}, {checkpoint.name}"
        print_status(f"network {number} of {len(checkpoints)}: {title}", quiet=quiet)
        network = checkpoint.run.segmenter(checkpoint.step)
        _check_classes(checkpoint.run, network, target)
        own = checkpoint.options(options)
        source_miou = _source_miou(checkpoint, options.device) if same_source else None
        found = unlabeled.label_free_metrics(network, target, split, own, reference=other, perturbations=perturbations)
        metrics.append(found.model_copy(update={"source_miou": source_miou}))
        source = checkpoint.run.recipe.source
        estimable = estimates and source is not None and has_labels(source, "val")
        estimated.append(estimate(network, source, target, own, split=split) if estimable and source else None)
        run, step = checkpoint.run, checkpoint.step
        stored = stored_scores(run, "target", "val", target, step) if with_labels else None
        if with_labels and stored is None:  # labels are read once per network
            stored = evaluate_domain(run, target, "target", "val", device=options.device, checkpoint=step)
        scored.append(stored)
    if with_labels or "consensus" in validators:
        metrics = _with_consensus(checkpoints, metrics, target, split, options)
    candidates = _sorted_candidates(checkpoints, metrics, estimated, scored, validators)
    columns = _columns(candidates)
    return Ranking(
        target=target.model_dump(mode="json"), split=split, validators=tuple(validators), candidates=tuple(candidates),
        best={name: candidates[index].title for name, c in columns.items() if (index := highest(c)) is not None},
        quality=_quality(candidates, columns) if with_labels else None,
        labels_opened=sum(scores.labels_opened for scores in scored if scores is not None),
    )  # fmt: skip


def _sorted_candidates(
    checkpoints: Sequence[Checkpoint], metrics: Sequence[LabelFreeMetrics], estimated: Sequence[Estimate | None],
    scored: Sequence[Scores | None], validators: Sequence[str],
) -> list[Candidate]:  # fmt: skip
    """Candidates of the checkpoints, highest mean rank over the validators first."""
    ranks = mean_ranks([values.by_validator() for values in metrics], validators)
    candidates = [
        Candidate(
            run=str(checkpoint.run.path), checkpoint=checkpoint.name, metrics=metrics[index], mean_rank=ranks[index],
            estimate=estimated[index], target_miou=(scores := scored[index]) and (scores.miou or 0.0),
        )
        for index, checkpoint in enumerate(checkpoints)
    ]  # fmt: skip
    return sorted(candidates, key=lambda candidate: -candidate.mean_rank)


def write_ranking(ranking: Ranking, out: Path) -> Path:
    """Write ``ranking.json`` into a folder; raise `RecipeError` if it is a file."""
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "ranking.json"
    write_text(file, ranking.model_dump_json(indent=2) + "\n")
    return file


def shared_target(runs: Sequence[Run]) -> Domain:
    """Return the only target of the runs that have one; raise `RecipeError` if they have several, or none."""
    targets = {str(run.recipe.target.model_dump(mode="json")): run for run in runs if run.recipe.target is not None}
    if not targets:
        raise RecipeError("none of the runs has a target; set target in the recipe and train again")
    if len(targets) > 1:
        first, second = list(targets.values())[:2]
        raise RecipeError(
            f"{first.path} and {second.path} have different targets; rank the runs of one target at a time"
        )
    return next(iter(targets.values())).recipe.domain("target")


def mean_ranks(candidates: Sequence[Mapping[str, float | None]], validators: Sequence[str]) -> list[float]:
    """Mean rank of each candidate over validators: 0 for the last by all, 1 for the first by all.

    Each validator ranks all candidates, so scales do not matter; equal values share their mean rank. A validator
    without a value for some candidate is left out; without any validator all candidates get 0.5. ``candidates`` holds
    the values of each by validator; higher is better.
    """
    from scipy.stats import rankdata

    columns = [[candidate.get(name) for candidate in candidates] for name in validators]
    complete = [column for column in columns if all(value is not None for value in column)]
    if len(candidates) < 2 or not complete:
        return [0.5] * len(candidates)
    shares = (rankdata(np.asarray(complete, np.float64), axis=1) - 1) / (len(candidates) - 1)
    return [float(share) for share in np.mean(shares, axis=0)]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, -1 to 1; None for fewer than two values or if either side is constant."""
    from scipy.stats import spearmanr

    if len(first) < 2 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    value = float(spearmanr(first, second).statistic)
    return value if math.isfinite(value) else None


def highest(values: Sequence[float | None]) -> int | None:
    """Index of the highest value, the first of equals; None if there is none."""
    return max((i for i, value in enumerate(values) if value is not None), key=lambda i: values[i] or 0.0, default=None)


def _check_classes(run: Run, network: Segmenter, target: Domain) -> None:
    if network.classes.names != target.classes.names:
        raise RecipeError(f"{run.path} has other classes than the target {target.title}; leave it out")


def _with_consensus(
    checkpoints: Sequence[Checkpoint], metrics: Sequence[LabelFreeMetrics], target: Domain, split: Split,
    options: MetricOptions,
) -> list[LabelFreeMetrics]:  # fmt: skip
    """The metrics with `consensus`, if all networks have the same resize."""
    resizes = {checkpoint.run.recipe.resize for checkpoint in checkpoints}
    if len(resizes) > 1:
        return list(metrics)
    images = list(unlabeled_images(target, split, replace(options, resize=resizes.pop())))
    predicted = (
        unlabeled.predict_probabilities(checkpoint.run.segmenter(checkpoint.step), images, checkpoint.options(options))
        for checkpoint in checkpoints
    )
    return [
        values.model_copy(update={"consensus": unlabeled.balanced_miou(sum(pairs[1:], pairs[0])) if pairs else None})
        for values, pairs in zip(metrics, unlabeled.consensus(predicted), strict=True)
    ]


def _source_miou(checkpoint: Checkpoint, device: torch.device | str) -> float | None:
    """Source mIoU from the run's log or ``scores.json``, else computed; None without source labels."""
    run, source = checkpoint.run, checkpoint.run.recipe.source
    split = run.recipe.validation.split
    if source is None or not has_labels(source, split):
        return None
    if checkpoint.step is not None:
        return logged_source_miou(list(run.log.rows()), checkpoint.step)
    stored = stored_scores(run, "source", split, source)
    return (stored or evaluate_domain(run, source, "source", split, device=device)).miou


def _columns(candidates: Sequence[Candidate]) -> dict[str, list[float | None]]:
    """Return values of all candidates by validator, mean rank and expected mIoU, if every candidate has one."""
    rows = [
        {**candidate.metrics.by_validator(), "mean_rank": candidate.mean_rank,
         "expected": candidate.estimate.expected if candidate.estimate else None}
        for candidate in candidates
    ]  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: column for name, column in columns.items() if all(value is not None for value in column)}


def _quality(candidates: Sequence[Candidate], columns: dict[str, list[float | None]]) -> dict[str, ValidatorQuality]:
    mious = [candidate.target_miou or 0.0 for candidate in candidates]
    quality = {}
    for name, column in columns.items():
        index = highest(column)
        if index is not None:
            quality[name] = ValidatorQuality(
                best=candidates[index].title,
                correlation=rank_correlation([value or 0.0 for value in column], mious),
                regret=max(mious) - mious[index],
            )
    return quality
