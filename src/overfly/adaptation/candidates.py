"""Candidates of a comparison: their metrics, checks and agreement, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from overfly.adaptation.estimate import Estimate, estimate
from overfly.adaptation.gate import Check, Gate, familiarity, passes, select
from overfly.adaptation.reverse_validation import reverse_validation
from overfly.adaptation.selection import ADAPTED, BASELINE, CandidateReport, Selection, setting_differences
from overfly.data.domain import Domain, Split, SplitError
from overfly.evaluation.images import MetricOptions, unlabeled_images
from overfly.evaluation.label_free_metrics import LabelFreeMetrics, consensus, label_free_metrics
from overfly.evaluation.perturbations import geometric_perturbations
from overfly.evaluation.score import score
from overfly.methods.recalibrate import Recalibrate
from overfly.methods.source_only import SourceOnly
from overfly.models.segmenter import Segmenter
from overfly.ops.geometry import Dihedral
from overfly.ops.normalization import estimate_statistics
from overfly.recipe import Recipe
from overfly.training.evaluate import evaluate_domain, has_labels, stored_scores
from overfly.training.run import Run
from overfly.training.setup import STATISTICS_BATCHES, source_images, training_streams

METRIC_IMAGES = 16
"""Target images for label-free metrics."""
CROP = 320
"""Side of the center crop of these images, in pixels."""
ESTIMATE_IMAGES = 8
"""Images of each domain for the estimate, which perturbs each in two dozen ways."""
ESTIMATE_SPLIT: Split = "val"
"""Split of the source that the estimate is calibrated on."""


class CandidateComparison:
    """Metrics of candidates, each computed once, and the choice among those that pass the checks."""

    def __init__(self, recipes: Sequence[Recipe], gate: Gate, device: torch.device, *, estimates: bool) -> None:
        self.recipes, self.gate, self.recipe = recipes, gate, recipes[0]
        self.target = self.recipe.domain("target")
        self.options = MetricOptions(METRIC_IMAGES, CROP, self.recipe.resize, self.recipe.window, device)
        source = self.recipe.source
        self.estimates = estimates and source is not None and has_labels(source, ESTIMATE_SPLIT)
        self.networks: dict[str, Segmenter] = {}
        self.runs: dict[str, Run | Path] = {}
        self.metrics: dict[str, LabelFreeMetrics] = {}
        self.estimated: dict[str, Estimate] = {}
        self.checks: dict[str, tuple[Check, ...]] = {}
        self.recommended, self.better = BASELINE, dict[str, float]()

    def select(self, runs: Mapping[str, Run | Path]) -> str:
        """Return the name of the best candidate: of those that pass, the one nearest to the mean of all predictions."""
        self.runs |= runs
        for name, run in runs.items():
            if name not in self.networks:
                self._add(name, run)
        names = [name for name in self.networks if passes(self.checks[name])]
        images = unlabeled_images(self.target, "train", self.options)
        networks = [(self.networks[name], self.options.window) for name in names]
        agreements = consensus(networks, list(images), self.options.device)
        self.recommended, scores, self.better = select(BASELINE, dict(zip(names, agreements, strict=True)))
        for name, value in scores.items():
            self.metrics[name] = self.metrics[name].model_copy(update={"consensus": value})
        return self.recommended

    def _add(self, name: str, run: Run | Path) -> None:
        """Compute the metrics and checks of a candidate."""
        network = self.networks[name] = load_candidate(run).without_training_heads()
        metrics = self._metrics_of(network, self.target, "train")
        self.metrics[name] = metrics.model_copy(update={"source_miou": self._source_miou(name, run)})
        if self.estimates:
            options = replace(self.options, limit=ESTIMATE_IMAGES)
            self.estimated[name] = estimate(network, self.recipe.domain("source"), self.target, options)
        self.checks[name] = self.gate.checks(self.metrics[BASELINE], self.metrics[name])

    def _metrics_of(self, network: Segmenter, domain: Domain, split: Split) -> LabelFreeMetrics:
        reference = self.networks[BASELINE]
        turns = any(isinstance(entry, Dihedral) for entry in self.recipe.augment)
        perturbations = geometric_perturbations(turns=turns)
        return label_free_metrics(
            network, domain, split, self.options,
            reference=reference, reference_classes=True, perturbations=perturbations,
        )  # fmt: skip

    def _source_miou(self, name: str, run: Run | Path) -> float | None:
        """MIoU on the source's held-out labels, with statistics of the source; stored scores are reused."""
        recipe, split, device = self.recipe, self.recipe.validation.split, self.options.device
        if recipe.source is None or not has_labels(recipe.source, split):
            return None
        if isinstance(run, Run) and isinstance(run.recipe.method, Recalibrate) and BASELINE in self.metrics:
            return self.metrics[BASELINE].source_miou
        if name == BASELINE and isinstance(run, Run) and _same_protocol(run.recipe, recipe):
            stored = stored_scores(run, "source", split, recipe.source)
            return (stored or evaluate_domain(run, recipe.source, "source", split, device=device)).miou
        network = self.source_network(name, run)
        return score(
            network, recipe.source, split, resize=recipe.resize, window=recipe.window or None, device=device
        ).miou

    def source_network(self, name: str, run: Run | Path) -> Segmenter:
        """Return a candidate's network with batch-normalization statistics of the source."""
        if isinstance(run, Run) and isinstance(run.recipe.method, Recalibrate):
            return load_candidate(self.runs[BASELINE])
        network = load_candidate(run).to(self.options.device)
        if name != BASELINE:
            stream, _ = training_streams(self.recipe.model_copy(update={"method": SourceOnly()}), "memory")
            estimate_statistics(network, source_images(stream, STATISTICS_BATCHES))
        return network

    def selection(self, runs: Mapping[str, Run | Path], labels_opened: int) -> Selection:
        """Return the result of the last `select`; ``labels_opened`` is stored with it."""
        adapted = [name for name in runs if name.startswith(ADAPTED)]
        settings = dict(zip(adapted, setting_differences(self.recipes), strict=True))
        familiar, reverse = self._target_metrics()
        candidates = {
            name: CandidateReport(
                run=str(run.path if isinstance(run, Run) else run),
                metrics=self.metrics[name],
                settings=settings.get(name, {}),
                checks=self.checks[name],
                better=self.better.get(name),
                estimate=self.estimated.get(name),
                labeled_miou=_labeled_miou(run, self.recipe),
            )
            for name, run in runs.items()
        }
        return Selection(
            recommended=self.recommended,
            candidates=candidates,
            recipes=tuple(entry.model_dump(mode="json") for entry in self.recipes),
            gate=self.gate,
            target=self.target.model_dump(mode="json"),
            target_checks=self.gate.target_checks(familiar, reverse),
            labels_opened=labels_opened,
        )

    def _target_metrics(self) -> tuple[float | None, float | None]:
        """Return familiarity and reverse validation of the target; None without held-out images or labels."""
        if not _has_held_out_images(self.recipe):
            return None, None
        source, held_out = self.recipe.domain("source"), self.recipe.validation.split
        baseline = self.networks[BASELINE]
        familiar = familiarity(self._metrics_of(baseline, source, held_out), self.metrics[BASELINE])
        if not (has_labels(source, "train") and has_labels(source, held_out)):
            return familiar, None
        return familiar, reverse_validation(baseline, source, self.target, held_out, self.options)


def _has_held_out_images(recipe: Recipe) -> bool:
    """Return True if the source has a validation split with images, other than train."""
    try:
        split = recipe.validation.split
        return recipe.source is not None and split != "train" and bool(recipe.source.items(split))
    except SplitError:
        return False


def _same_protocol(first: Recipe, second: Recipe) -> bool:
    return (first.resize, first.window) == (second.resize, second.window)


def load_candidate(run: Run | Path) -> Segmenter:
    """Load the network of a run or a weights file."""
    return run.segmenter() if isinstance(run, Run) else Segmenter.load(run)


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
