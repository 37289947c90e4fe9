"""Training on the source alone: the baseline that every adaptation is measured against."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from overfly.core.records import Batch, Losses
from overfly.methods.method import Method, Networks


class SourceOnly(Method[Networks], name="source_only"):
    """Learn from the labeled source and never look at the target."""

    needs_target: ClassVar[bool] = False

    def networks(self, student: nn.Module) -> Networks:
        """The student alone."""
        return Networks(student)

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """The criterion on the source."""
        return self.supervised(nets.student(batch.source.image), batch.source.label)
