"""AdaBN: batch-normalization statistics estimated on the target (Li et al., ICLR workshop 2017, arXiv:1603.04779)."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from overfly.core.optimizers import Optim
from overfly.core.records import Batch, Losses
from overfly.core.spec import Share
from overfly.methods.method import Method, Networks
from overfly.ops.normalization import blend_statistics, reset_statistics, updating_statistics


class RecalibrateNetworks(Networks):
    """The student that collects the target's statistics, and the starting network."""

    def __init__(self, student: nn.Module, start: nn.Module) -> None:
        super().__init__(student)
        self.start = start


class Recalibrate(Method[Networks], name="recalibrate"):
    """Estimate the statistics of batch normalization on target images; all weights stay unchanged (Li et al., 2017).

    Each step adds one batch to an average over all batches, so `steps` is the number of batches. Where the class
    frequencies of the domains differ, a share below 1 keeps part of the source's statistics (Schneider et al., 2020,
    arXiv:2006.16971).
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    share: Share = 1.0
    """Share of the target's statistics; the rest is that of the starting network."""

    def networks(self, student: nn.Module) -> Networks:
        """The student with reset statistics; with a share below 1 also the starting network."""
        student.requires_grad_(False)
        start = None if self.share == 1 else copy.deepcopy(student)
        reset_statistics(student)
        return Networks(student) if start is None else RecalibrateNetworks(student, start)

    @torch.no_grad()
    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Update the statistics by a forward pass; returns no loss."""
        with updating_statistics(nets.student):
            nets.student(batch.target)
        return {}

    def optimizers(self, nets: Networks, optim: Optim) -> list[Optimizer]:  # noqa: ARG002
        return []

    def inference_network(self, nets: Networks) -> nn.Module:
        """The student, or the starting network with blended statistics."""
        if not isinstance(nets, RecalibrateNetworks):
            return nets.student
        blended = copy.deepcopy(nets.start)
        blend_statistics(blended, nets.student, self.share)
        return blended
