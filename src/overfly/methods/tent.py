"""Tent: entropy minimization over batch normalization (Wang et al., ICLR 2021, arXiv:2006.10726)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from overfly.core.records import Batch, Losses
from overfly.methods.method import Method, Networks
from overfly.ops.losses import mean_entropy
from overfly.ops.normalization import batch_norms, freeze_unused, updating_statistics


class Tent(Method[Networks], name="tent"):
    """Minimize the entropy of target predictions over scales and shifts of batch normalization (Wang et al., 2021).

    Batches are normalized by their own statistics; inference uses the running ones, which converge to the
    target within about thirty steps. The paper adapts at test time, this method on the target's training images.
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True

    def networks(self, student: nn.Module) -> Networks:
        """The student, frozen except for the scales and shifts that its class scores depend on."""
        student.requires_grad_(False)
        for norm in batch_norms(student):
            norm.requires_grad_(True)
        nets = Networks(student)
        freeze_unused(student, nets.segmenter.bands, lambda logits: (logits.main,))
        return nets

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Mean entropy of the target's predictions."""
        with updating_statistics(nets.student):
            logits = nets.student(batch.target)
        return {"entropy": mean_entropy(logits.main, batch.valid_mask)}
