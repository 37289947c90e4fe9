"""ADVENT and MinEnt: certainty on the target, by a critic or directly (Vu et al., CVPR 2019, arXiv:1811.12833)."""

from __future__ import annotations

from torch import Tensor, nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegative
from overfly.methods.adaptsegnet import AdaptSegNet
from overfly.methods.adversarial import Levels, check_levels, outputs
from overfly.methods.method import Method, Networks
from overfly.ops.losses import mean_entropy, self_information
from overfly.ops.normalization import together


class Advent(AdaptSegNet, name="advent"):
    """Make maps of self-information on the target look to a critic like those on the source (Vu et al., 2019).

    A network is sure on the source and unsure on the target. The critic sees ``-p log p`` of each class, so the student
    fools it by being sure where it would be on the source. Source and target pass the student in one batch: its batch
    normalization has the statistics of both.
    """

    def judged(self, scores: Tensor) -> Tensor:
        """What a critic sees of class scores (B, K, H, W): the self-information of each class."""
        return self_information(scores)


class MinEnt(Method[Networks], name="minent"):
    """Minimize the entropy of the predictions on the target (Vu et al., 2019).

    The direct way to certainty, pixel by pixel and without a critic. Source and target pass the student in one batch:
    its batch normalization has the statistics of both.
    """

    levels: Levels = "single"
    """Whose entropy is minimized: that of the main scores, or (``multi``) that of the auxiliary head's too."""
    weight: NonNegative = 0.001
    """Weight of the entropy of the main scores, which lies between 0 and 1."""
    aux_weight: NonNegative = 0.0002
    """Weight of the entropy of the auxiliary scores."""

    def networks(self, student: nn.Module) -> Networks:
        """The student alone."""
        check_levels(student, self.levels)
        return Networks(student)

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """The criterion on the source; mean entropy on the target."""
        source, target = together(nets.student, batch.source.image, batch.target)
        levels = zip(
            ("entropy", "entropy_aux"), (self.weight, self.aux_weight), outputs(target, self.levels), strict=False
        )
        return {
            **self.supervised(source, batch.source.label),
            **{name: weight * mean_entropy(scores, batch.valid_mask) for name, weight, scores in levels},
        }
