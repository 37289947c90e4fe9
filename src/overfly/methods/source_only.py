"""Source only: supervised training on the source, the baseline of every adaptation."""

from typing import ClassVar

from overfly.core.records import Batch, Losses
from overfly.methods.method import Method, Networks


class SourceOnly(Method[Networks], name="source_only"):
    """Train on the labeled source alone.

    At the end, batch-normalization statistics are estimated again on source images without augmentation (Wu and
    Johnson, 2021, arXiv:2105.07576, "precise BatchNorm"): the moving averages of training follow weights of the past.
    """

    needs_target: ClassVar[bool] = False
    source_statistics: ClassVar[bool] = True

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Supervised loss on the source."""
        return self.supervised(nets.student(batch.source.image), batch.source.label)
