"""AdaptSegNet: predictions of both domains made alike (Tsai et al., CVPR 2018, arXiv:1802.10349)."""

from __future__ import annotations

from torch import Tensor, nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegative
from overfly.methods.adversarial import Adversarial, Levels, WithCritic, critics, outputs, play
from overfly.ops.losses import probabilities
from overfly.ops.normalization import together


class AdaptSegNet(Adversarial[WithCritic], name="adaptsegnet"):
    """Make predictions on the target look to a critic like those on the source (Tsai et al., 2018).

    The arrangement of classes in a picture differs less between domains than its look, so the game is played on class
    probabilities. Source and target pass the student in one batch: its batch normalization has the statistics of both.
    """

    levels: Levels = "single"
    """What critics judge: the main scores, or (``multi``) those of the auxiliary head too, by a critic of their own."""
    weight: NonNegative = 0.001
    """Weight of fooling the critic of the main scores."""
    aux_weight: NonNegative = 0.0002
    """Weight of fooling the critic of the auxiliary scores."""

    def networks(self, student: nn.Module) -> WithCritic:
        """The student and a critic a level."""
        return WithCritic(student, critics(student, self.levels))

    def losses(self, nets: WithCritic, batch: Batch) -> Losses:
        """The criterion on the source; the student fools the critics; they learn to tell the domains apart."""
        source, target = together(nets.student, batch.source.image, batch.target)
        seen, shown = ([self.judged(scores) for scores in outputs(part, self.levels)] for part in (source, target))
        return {
            **self.supervised(source, batch.source.label),
            **play(nets.critic.children(), seen, shown, (self.weight, self.aux_weight)),
        }

    def judged(self, scores: Tensor) -> Tensor:
        """What a critic sees of class scores (B, K, H, W): the probabilities."""
        return probabilities(scores)
