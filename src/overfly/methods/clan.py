"""CLAN: category-level adversarial adaptation (Luo et al., CVPR 2019, arXiv:1809.09478)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.optimizers import Optim
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import NonNegativeFloat, NonNegativeInt
from overfly.methods.adversarial import (
    Adversarial,
    Critic,
    StudentCritic,
    adversarial_loss,
    critic_loss,
    student_outputs,
)
from overfly.methods.mcd import TwoOutputs, class_layer, head_optimizer, second_class_layer, two_classifier_forward
from overfly.methods.method import prefixed
from overfly.ops.losses import probabilities


class TwoClassifiersCritic(StudentCritic):
    """A student, a second class layer, and a critic of their ensemble."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student, Critic(student_outputs(student).main.shape[1]))
        self.second = second_class_layer(student)


class CLAN(Adversarial[TwoClassifiersCritic], name="clan"):
    """Weigh the adversarial loss of each target pixel by the disagreement of two class layers (Luo et al., 2019).

    A loss on the angle between their weights separates the class layers. The critic reads the softmax of their summed
    scores. Disagreement weighs the target in the student's loss and in the critic's. Source and target share one
    forward pass. Inference uses the student with its own class layer, where the paper sums both. As in the published
    code the weights are 1 for the first steps (`preheat_steps`); its damping of the weights over the steps is left out.
    """

    weight: NonNegativeFloat = 0.001
    """Weight of the adversarial loss."""
    local_weight: NonNegativeFloat = 40.0
    """Factor of the disagreement in a target pixel's weight (λ_local)."""
    epsilon: NonNegativeFloat = 0.4
    """Weight of a target pixel without disagreement (ε)."""
    preheat_steps: NonNegativeInt = 500
    """Steps in which every target pixel weighs 1, while the second class layer is untrained; the published code takes a
    twentieth of all steps."""
    discrepancy_weight: NonNegativeFloat = 0.01
    """Weight of the cosine between the class layers' weights."""

    def networks(self, student: nn.Module) -> TwoClassifiersCritic:
        return TwoClassifiersCritic(student)

    def losses(self, nets: TwoClassifiersCritic, batch: Batch) -> Losses:
        """Supervised loss of both class layers on the source; weight discrepancy; adversarial losses."""
        (source, target), _ = two_classifier_forward(nets.student, nets.second, batch.source.image, batch.target)
        weight = None
        if nets.step >= self.preheat_steps:
            weight = self.epsilon + self.local_weight * disagreement(target)
        return {
            **self.supervised(source.logits, batch.source.label),
            **prefixed("second", self.supervised(Logits(source.second), batch.source.label)),
            "discrepancy": self.discrepancy_weight * alignment(class_layer(nets.student), nets.second),
            "adversarial": self.weight * adversarial_loss(nets.critic, ensemble(target), weight),
            "critic": critic_loss(nets.critic, ensemble(source), ensemble(target), weight),
        }

    def optimizers(self, nets: TwoClassifiersCritic, optim: Optim) -> list[Optimizer]:
        return [*super().optimizers(nets, optim), head_optimizer(nets.second, optim)]


def ensemble(outputs: TwoOutputs) -> Tensor:
    """Class probabilities (B, K, H, W) of the summed scores of both class layers."""
    return probabilities(outputs.logits.main + outputs.second)


def disagreement(outputs: TwoOutputs) -> Tensor:
    """One minus the cosine of both class layers' probabilities at each pixel (B, H, W): 0 to 1 (equation 4)."""
    return 1 - F.cosine_similarity(probabilities(outputs.logits.main), probabilities(outputs.second), dim=1)


def alignment(first: nn.Module, second: nn.Module) -> Tensor:
    """Cosine between the kernels of two layers of one form, -1 to 1 (equation 3); biases and normalization left out."""
    first_weights, second_weights = (
        torch.cat([p.flatten() for p in layer.parameters() if p.ndim > 1]) for layer in (first, second)
    )
    return F.cosine_similarity(first_weights, second_weights, dim=0)
