"""Source only: supervised training on the source, the baseline of every adaptation."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from overfly.core.records import Batch, Losses
from overfly.methods.method import Method, Networks


class SourceOnly(Method[Networks], name="source_only"):
    """Train on the labeled source alone."""

    needs_target: ClassVar[bool] = False

    def networks(self, student: nn.Module) -> Networks:
        """The student alone."""
        return Networks(student)

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Supervised loss on the source."""
        return self.supervised(nets.student(batch.source.image), batch.source.label)
