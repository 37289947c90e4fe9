"""Source images in the target's colors (after Reinhard et al., 2001)."""

from __future__ import annotations

from torch import nn

from overfly.core.records import Batch, Losses
from overfly.methods.method import Method, Networks
from overfly.ops.style import match_colors


class ColorTransfer(Method[Networks], name="color_transfer"):
    """Give source images each band's mean and spread of the target's images, and learn from them (Reinhard, 2001).

    It happens in the sensor's own bands, not in an opponent color space, so that any number of bands will do.
    """

    each: bool = False
    """Whether every source image takes the colors of one target image, or the batch as a whole those of the target's
    batch; one by one, a picture of water may take the colors of fields."""

    def networks(self, student: nn.Module) -> Networks:
        """The student alone."""
        return Networks(student)

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """The criterion on recolored source images."""
        image, label = batch.source
        recolored = match_colors(image, batch.target, each=self.each).clamp(0, nets.segmenter.max_value)
        return self.supervised(nets.student(recolored), label)
