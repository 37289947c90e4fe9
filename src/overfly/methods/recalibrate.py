"""Batch-normalization statistics estimated on the target (Li et al., ICLR workshop 2017, arXiv:1603.04779)."""

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.errors import RecipeError
from overfly.core.optimizers import Optim
from overfly.core.records import IGNORE, Batch, Losses
from overfly.core.spec import Share
from overfly.methods.method import Method, Networks
from overfly.models.segmenter import Segmenter
from overfly.ops.normalization import (
    batch_norms,
    blend_statistics,
    reset_statistics,
    updating_statistics,
    weighted_statistics,
)

MAX_RATIO = 20.0
"""Largest weight of a class, and the inverse of the smallest."""
COUNTING_STEPS = 3
"""Steps after which statistics are started again, since the class shares of the first batches are uncertain."""


class RecalibrateNetworks(Networks):
    """The student that collects the target's statistics, the starting network, and pixels per class of each domain.

    Attributes:
        source_counts: labeled pixels of the source by class (K,).
        target_counts: pixels of the target by class that the starting network predicts (K,).
    """

    eval_networks = ("start",)
    start: Segmenter
    source_counts: Tensor
    target_counts: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.start = copy.deepcopy(self.segmenter)
        reset_statistics(student)
        for name in ("source_counts", "target_counts"):
            self.register_buffer(name, torch.zeros(len(self.segmenter.classes)))


class Recalibrate(Method[RecalibrateNetworks], name="recalibrate"):
    """Estimate the statistics of batch normalization on target images; all weights stay unchanged (Li et al., 2017).

    Each step adds one batch to an average over all batches, so `steps` is the number of batches. Statistics follow the
    look of the target (light, sensor, season), and also its class shares: where these differ from the source's, use
    recalibrate_by_class, or a share below 1, which keeps part of the source's statistics (Schneider et al., 2020,
    arXiv:2006.16971).
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    share: Share = 1.0
    """Share of the target's statistics; the rest is that of the starting network."""

    def networks(self, student: nn.Module) -> RecalibrateNetworks:
        """The student with reset statistics, and the starting network; `RecipeError` without batch normalization."""
        if not batch_norms(student):
            name = getattr(student, "architecture", "this network")
            raise RecipeError(f"method {self.name} needs batch normalization, and {name} has none; set another method")
        return RecalibrateNetworks(student.requires_grad_(False))

    @torch.no_grad()
    def losses(self, nets: RecalibrateNetworks, batch: Batch) -> Losses:
        """Update the statistics by a forward pass; returns no loss."""
        with updating_statistics(nets.student):
            nets.student(batch.target)
        return {}

    def optimizers(self, nets: RecalibrateNetworks, optim: Optim) -> list[Optimizer]:  # noqa: ARG002
        return []

    def inference_network(self, nets: RecalibrateNetworks) -> Segmenter:
        """The starting network with blended statistics."""
        blended = copy.deepcopy(nets.start)
        blend_statistics(blended, nets.student, self.share)
        return blended


class RecalibrateByClass(Recalibrate, name="recalibrate_by_class"):
    """Estimate the statistics of batch normalization on target images, weighted to the class shares of the source.

    Each pixel is weighted by the source's share of its class over the target's share, both as predicted by the starting
    network for the target and labeled for the source. Without weights, statistics follow the class shares too, and a
    rare class is normalized away: source images resampled to another domain's class shares show the same collapse.
    """

    needs_source: ClassVar[bool] = True

    @torch.no_grad()
    def losses(self, nets: RecalibrateNetworks, batch: Batch) -> Losses:
        """Update class counts and statistics by forward passes; returns no loss."""
        if nets.step == COUNTING_STEPS:
            reset_statistics(nets.student)
        predicted = nets.start.scores(batch.target).argmax(1)
        if batch.nodata_mask is not None:
            predicted = predicted.masked_fill(batch.nodata_mask, IGNORE)
        for counts, labels in ((nets.source_counts, batch.source.label), (nets.target_counts, predicted)):
            ids = labels.flatten()  # scattered, since counting by value would wait for the device
            per_value = counts.new_zeros(IGNORE + 1).scatter_add_(0, ids, counts.new_ones(ids.shape))
            counts.add_(per_value[: len(counts)])
        source, target = (counts / counts.sum().clamp_min(1) for counts in (nets.source_counts, nets.target_counts))
        ratio = (source / target.clamp_min(1e-6)).clamp(1 / MAX_RATIO, MAX_RATIO)
        weight = torch.where(predicted == IGNORE, 0.0, ratio[predicted.clamp_max(len(ratio) - 1)])
        with weighted_statistics(nets.student, weight):
            nets.student(batch.target)
        return {}
