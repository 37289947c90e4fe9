"""Source only: supervised training on the source, the baseline of every adaptation."""

from __future__ import annotations

from typing import ClassVar

from overfly.core.records import Batch, Losses
from overfly.methods.method import Method, Networks


class SourceOnly(Method[Networks], name="source_only"):
    """Train on the labeled source alone."""

    needs_target: ClassVar[bool] = False

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Supervised loss on the source."""
        return self.supervised(nets.student(batch.source.image), batch.source.label)
