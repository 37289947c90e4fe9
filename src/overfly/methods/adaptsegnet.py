"""AdaptSegNet (Tsai et al., CVPR 2018, arXiv:1802.10349); ADVENT, MinEnt (Vu et al., CVPR 2019, arXiv:1811.12833)."""

from __future__ import annotations

from torch import Tensor, nn

from overfly.core.records import Batch, Losses
from overfly.core.spec import NonNegativeFloat
from overfly.methods.adversarial import (
    Adversarial,
    Levels,
    StudentCritic,
    adversarial_terms,
    check_levels,
    level_critics,
    level_scores,
)
from overfly.methods.method import Method, Networks
from overfly.ops.losses import mean_entropy, probabilities, self_information
from overfly.ops.normalization import joint_forward


class AdaptSegNet(Adversarial[StudentCritic], name="adaptsegnet"):
    """Train the student so that a critic classifies its target predictions as source (Tsai et al., 2018).

    The critic reads class probabilities, since the layout of classes differs less between domains than appearance.
    Source and target share one forward pass.
    """

    levels: Levels = "single"
    """Outputs with a critic: the main scores, or (``multi``) those of the auxiliary head too."""
    weight: NonNegativeFloat = 0.001
    """Weight of the adversarial loss of the main scores."""
    aux_weight: NonNegativeFloat = 0.0002
    """Weight of the adversarial loss of the auxiliary scores."""

    def networks(self, student: nn.Module) -> StudentCritic:
        return StudentCritic(student, level_critics(student, self.levels))

    def losses(self, nets: StudentCritic, batch: Batch) -> Losses:
        """Supervised loss on the source; adversarial losses of student and critics."""
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        source_maps, target_maps = (
            [self.critic_input(scores) for scores in level_scores(logits, self.levels)] for logits in (source, target)
        )
        return {
            **self.supervised(source, batch.source.label),
            **adversarial_terms(nets.critic.children(), source_maps, target_maps, (self.weight, self.aux_weight)),
        }

    def critic_input(self, scores: Tensor) -> Tensor:
        """Class probabilities (B, K, H, W) of class scores."""
        return probabilities(scores)


class Advent(AdaptSegNet, name="advent"):
    """Train the student so that a critic classifies its target self-information as source (Vu et al., 2019).

    The critic reads ``-p log p`` of each class, which is low at confident pixels, so the target predictions become as
    confident as the source predictions. Source and target share one forward pass.
    """

    def critic_input(self, scores: Tensor) -> Tensor:
        """Self-information of each class (B, K, H, W) from class scores."""
        return self_information(scores)


class MinEnt(Method[Networks], name="minent"):
    """Minimize the entropy of the predictions on the target (Vu et al., 2019, section 3.1).

    Source and target share one forward pass.
    """

    levels: Levels = "single"
    """Outputs whose entropy is minimized: the main scores, or (``multi``) those of the auxiliary head too."""
    weight: NonNegativeFloat = 0.001
    """Weight of the entropy of the main scores, which is 0 to 1."""
    aux_weight: NonNegativeFloat = 0.0002
    """Weight of the entropy of the auxiliary scores."""

    def networks(self, student: nn.Module) -> Networks:
        check_levels(student, self.levels)
        return Networks(student)

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        """Supervised loss on the source; mean entropy on the target."""
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        scores = level_scores(target, self.levels)
        levels = zip(("entropy", "entropy_aux"), (self.weight, self.aux_weight), scores, strict=False)
        return {
            **self.supervised(source, batch.source.label),
            **{name: weight * mean_entropy(level, batch.valid_mask) for name, weight, level in levels},
        }
