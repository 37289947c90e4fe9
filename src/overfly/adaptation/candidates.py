"""Candidates of a comparison: their metrics, checks and agreement, and the choice among them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from overfly.adaptation.estimate import Estimate, estimate
from overfly.adaptation.gate import UNSURE, Check, Gate, ImageCounts, familiarity, passes, share_better
from overfly.adaptation.labels import LEARNED, LabeledTiles, confusions, tile_scores
from overfly.adaptation.reverse_validation import reverse_validation
from overfly.adaptation.selection import ADAPTED, BASELINE, CandidateReport, Selection, setting_differences
from overfly.data.domain import Split, split_items
from overfly.evaluation import label_free_metrics as unlabeled
from overfly.evaluation.images import MetricOptions, labeled_images, unlabeled_images
from overfly.evaluation.label_free_metrics import LabelFreeMetrics
from overfly.evaluation.perturbations import Perturbation, geometric_perturbations
from overfly.evaluation.scores import Confusion
from overfly.methods.recalibrate import Recalibrate
from overfly.methods.source_only import SourceOnly
from overfly.models.checkpoints import weights_sha256
from overfly.models.segmenter import Segmenter
from overfly.ops.geometry import Dihedral
from overfly.ops.normalization import estimate_statistics
from overfly.recipe import Recipe
from overfly.training.evaluate import has_labels
from overfly.training.run import Run
from overfly.training.setup import STATISTICS_BATCHES, source_images, training_streams

METRIC_IMAGES = 16
"""Target images for label-free metrics."""
SOURCE_IMAGES = 32
"""Held-out source images for the source mIoU."""
CROP = 320
"""Side of the center crop of these images, in pixels."""
ESTIMATE_IMAGES = 8
"""Images of each domain for the estimate, which perturbs each in two dozen ways."""
ESTIMATE_SPLIT: Split = "val"
"""Split of the source that the estimate is calibrated on."""


class CandidateComparison:
    """Metrics of candidates, each computed once, and the choice among those that pass the checks."""

    def __init__(
        self, recipes: Sequence[Recipe], gate: Gate, device: torch.device, *, estimates: bool,
        tiles: LabeledTiles | None = None,
    ) -> None:  # fmt: skip
        self.recipes, self.gate, self.recipe, self.tiles = recipes, gate, recipes[0], tiles
        self.target = self.recipe.domain("target")
        self.options = MetricOptions(METRIC_IMAGES, CROP, self.recipe.resize, self.recipe.window, device)
        source = self.recipe.source
        self.estimates = estimates and source is not None and has_labels(source, ESTIMATE_SPLIT)
        self.images: list[Tensor] = []
        self.networks: dict[str, Segmenter] = {}
        self.predicted: dict[str, list[Tensor]] = {}
        self.runs: dict[str, Run | Path] = {}
        self.metrics: dict[str, LabelFreeMetrics] = {}
        self.counts: dict[str, ImageCounts] = {}
        self.tile_counts: dict[str, list[Confusion]] = {}
        self.estimated: dict[str, Estimate] = {}
        self.recommended = BASELINE

    def select(self, runs: Mapping[str, Run | Path]) -> str:
        """Return the name of the best candidate: of those that pass the checks, the one of the highest score."""
        self.runs |= runs
        self.images = self.images or list(unlabeled_images(self.target, "train", self.options))
        for name, run in runs.items():
            if name not in self.networks:
                self._add(name, run)
        self.recommended = max(self.passing, key=lambda name: self.metrics[name].score)
        return self.recommended

    def accepted(self, runs: Mapping[str, Run | Path], names: Iterable[str]) -> list[str]:
        """Return those of some candidates that no check rejects; ``runs`` are all candidates so far."""
        self.select(runs)
        return [name for name in names if name in self.passing]

    def choose(self, runs: Mapping[str, Run | Path]) -> str:
        """Return the best candidate by mIoU on the labeled tiles, or without such tiles as `select`.

        The network that learned from them is taken if its score is not surely below that of the best other one.
        """
        self.select(runs)
        if self.tiles is None:
            return self.recommended
        self.recommended = self.best_of([name for name in self.passing if name != LEARNED])
        if (self._share_better(LEARNED, self.recommended) or 0.0) >= UNSURE[0]:
            self.recommended = LEARNED
        return self.recommended

    def best_of(self, names: Iterable[str]) -> str:
        """Return the candidate of the highest mIoU on the labeled tiles."""
        return max(names, key=lambda name: tile_scores(self.tile_counts[name], None).miou.value)

    @property
    def passing(self) -> list[str]:
        """Names of the candidates that no check rejects."""
        return [name for name in self.networks if passes(self._checks(name))]

    def _add(self, name: str, run: Run | Path) -> None:
        """Compute the metrics of a candidate."""
        network = self.networks[name] = load_candidate(run).without_training_heads()
        predicted = self.predicted[name] = list(unlabeled.predict_probabilities(network, self.images, self.options))
        statistics = unlabeled.prediction_statistics(
            network, self.images, self.target.max_value, self.options,
            reference=self.predicted[BASELINE], perturbations=self._perturbations(), predicted=predicted,
        )  # fmt: skip
        if self.tiles is not None:
            self.tile_counts[name] = confusions(network, self.tiles.pairs, self.options)
        views = [pairs for view, pairs in statistics.confusions.items() if view != "reference"]
        self.counts[name] = ImageCounts(views, self._source_counts(network))
        own = _miou(self.counts[name].source)
        if name == BASELINE:
            restored = own
        elif isinstance(run, Run) and isinstance(run.recipe.method, Recalibrate):
            restored = self.metrics[BASELINE].source_miou
        else:
            restored = None if own is None else _miou(self._source_counts(self.source_network(name, run)))
        values = {"source_miou": own, "source_statistics_miou": restored}
        self.metrics[name] = statistics.metrics().model_copy(update=values)

    def _checks(self, name: str) -> tuple[Check, ...]:
        return self.gate.checks(self.metrics[BASELINE], self.metrics[name])

    def _perturbations(self) -> tuple[Perturbation, ...]:
        return geometric_perturbations(turns=any(isinstance(entry, Dihedral) for entry in self.recipe.augment))

    def _source_counts(self, network: Segmenter) -> list[Confusion]:
        """Confusion matrices of held-out source images, by labels and predictions; empty without labels."""
        return confusions(network, self.source_images, self.options)

    @cached_property
    def source_images(self) -> list[tuple[Tensor, Tensor]]:
        """Held-out source images (C, H, W) with their labels (H, W), read once; empty without labels."""
        source, split = self.recipe.source, self.recipe.validation.split
        if source is None or not has_labels(source, split):
            return []
        return list(labeled_images(source, split, replace(self.options, limit=SOURCE_IMAGES)))

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
        agreements = unlabeled.consensus(self.predicted[name] for name in runs)
        for name, pairs in zip(runs, agreements, strict=True):
            values = {"consensus": unlabeled.balanced_miou(sum(pairs[1:], pairs[0])) if pairs else None}
            self.metrics[name] = self.metrics[name].model_copy(update=values)
            if self.estimates:
                options = replace(self.options, limit=ESTIMATE_IMAGES)
                source = self.recipe.domain("source")
                self.estimated[name] = estimate(self.networks[name], source, self.target, options)
        adapted = [name for name in runs if name.startswith(ADAPTED)]
        settings = dict(zip(adapted, setting_differences(self.recipes), strict=True))
        familiar, reverse = self._check_target()
        candidates = {
            name: CandidateReport(
                run=str(run.path if isinstance(run, Run) else run),
                weights_sha256=weights_sha256(run.weights if isinstance(run, Run) else run),
                metrics=self.metrics[name], settings=settings.get(name, {}), checks=self._checks(name),
                better=self._share_better(name), estimate=self.estimated.get(name),
                tiles=None if self.tiles is None or name == LEARNED else tile_scores(
                    self.tile_counts[name], None if name == BASELINE else self.tile_counts[BASELINE]
                ),
            )
            for name, run in runs.items()
        }  # fmt: skip
        return Selection(
            recommended=self.recommended, candidates=candidates, gate=self.gate,
            recipes=tuple(entry.model_dump(mode="json") for entry in self.recipes),
            target=self.target.model_dump(mode="json"),
            target_checks=self.gate.target_checks(familiar, reverse),
            labels_opened=labels_opened + (0 if self.tiles is None else len(self.tiles.pairs)),
            labels=None if self.tiles is None else self.tiles.labels.model_dump(mode="json"),
        )  # fmt: skip

    def _share_better(self, name: str, than: str = BASELINE) -> float | None:
        """See `CandidateReport.better`."""
        if name == than or name not in self.passing:
            return None
        return share_better(self.counts[than], self.counts[name])

    def _check_target(self) -> tuple[float | None, float | None]:
        """Return familiarity and reverse validation of the target; None without held-out images or labels."""
        source, held_out = self.recipe.source, self.recipe.validation.split
        if source is None or held_out == "train" or not split_items(source, held_out):
            return None, None
        baseline = self.networks[BASELINE]
        metrics = unlabeled.label_free_metrics(
            baseline, source, held_out, self.options,
            reference=baseline, perturbations=self._perturbations(),
        )  # fmt: skip
        familiar = familiarity(metrics, self.metrics[BASELINE])
        if not (has_labels(source, "train") and has_labels(source, held_out)):
            return familiar, None
        return familiar, reverse_validation(baseline, source, self.target, held_out, self.options)


def _miou(pairs: Sequence[Confusion]) -> float | None:
    """MIoU of summed confusion matrices; None for none."""
    return sum(pairs[1:], pairs[0]).miou if pairs else None


def load_candidate(run: Run | Path) -> Segmenter:
    """Load the network of a run or a weights file."""
    return run.segmenter() if isinstance(run, Run) else Segmenter.load(run)
