"""AdaBN: batch-normalisation statistics estimated again on the target (Li et al., 2017, arXiv:1603.04779)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from overfly.core.optim import Optim
from overfly.core.records import Batch, Losses
from overfly.methods.method import Method, Networks
from overfly.ops.normalise import collecting_statistics, forget_statistics


class Recalibrate(Method[Networks], name="recalibrate"):
    """Keep every weight, estimate every mean and variance again on unlabelled target images; seconds of work.

    Each step adds one batch to a plain average over all batches, so `steps` says how many batches are looked at.
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True

    def networks(self, student: nn.Module) -> Networks:
        """The student, its statistics forgotten."""
        forget_statistics(student)
        return Networks(student.requires_grad_(False))

    @torch.no_grad()
    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Nothing to minimise: the forward pass alone moves the statistics."""
        with collecting_statistics(nets.student):
            nets.student(batch.target)
        return {}

    def optimizers(self, nets: Networks, optim: Optim) -> list[Optimizer]:  # noqa: ARG002
        """None."""
        return []
