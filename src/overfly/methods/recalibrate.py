"""AdaBN: batch-normalization statistics estimated again on the target (Li et al., 2017, arXiv:1603.04779)."""

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


class WithBeginning(Networks):
    """The student that collects the target's statistics, and the network as it was."""

    def __init__(self, student: nn.Module, beginning: nn.Module) -> None:
        super().__init__(student)
        self.beginning = beginning


class Recalibrate(Method[Networks], name="recalibrate"):
    """Keep every weight, estimate every mean and variance again on unlabeled target images; seconds of work.

    Each step adds one batch to a plain average over all batches, so `steps` says how many batches are looked at. Where
    the domains differ in how often classes occur, statistics of the target alone mislead; a share below 1 blends them
    with those that the network began with (Schneider et al., 2020, arXiv:2006.16971).
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    share: Share = 1.0
    """Share of the target's statistics; the rest are those that the network began with."""

    def networks(self, student: nn.Module) -> Networks:
        """The student, its statistics forgotten; with a share below 1 also the network as it was."""
        student.requires_grad_(False)
        beginning = None if self.share == 1 else copy.deepcopy(student)
        reset_statistics(student)
        return Networks(student) if beginning is None else WithBeginning(student, beginning)

    @torch.no_grad()
    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Nothing to minimize: the forward pass alone moves the statistics."""
        with updating_statistics(nets.student):
            nets.student(batch.target)
        return {}

    def optimizers(self, nets: Networks, optim: Optim) -> list[Optimizer]:  # noqa: ARG002
        """None."""
        return []

    def deployed(self, nets: Networks) -> nn.Module:
        """The student, or the network as it was with its statistics a share of the way to the student's."""
        if not isinstance(nets, WithBeginning):
            return nets.student
        blended = copy.deepcopy(nets.beginning)
        blend_statistics(blended, nets.student, self.share)
        return blended
