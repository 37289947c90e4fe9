"""CLAN: class by class, as far as two views disagree (Luo et al., CVPR 2019, arXiv:1809.09478)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.optimizers import Optim
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import NonNegative, Whole
from overfly.methods.adversarial import Adversarial, WithCritic, outline
from overfly.methods.two_classifiers import Views, class_layer, look, second_class_layer, twin_optimizer
from overfly.ops.adversarial import Critic, fool, tell_apart
from overfly.ops.losses import probabilities


class TwinsWithCritic(WithCritic):
    """A student, a second class layer, the critic of what both say together, and the steps that are done."""

    steps: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student, Critic(outline(student).main.shape[1]))
        self.twin = second_class_layer(student)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class CLAN(Adversarial[TwinsWithCritic], name="clan"):
    """Fool a critic hardest where two class layers disagree, and spare what is aligned already (Luo et al., 2019).

    Two class layers read the same map and are kept apart by a loss on the angle between their weights. The critic sees
    the softmax of their summed scores; each target pixel counts by the disagreement of the two there, in the student's
    term as in the critic's. Source and target pass the student in one batch: its batch normalization has the statistics
    of both. What is shipped is the student with the first class layer; the paper adds up both. As in the published
    code pixels weigh alike at first (`preheat`), while the second layer is new and disagrees everywhere; the damping of
    the weights over its steps is left out.
    """

    weight: NonNegative = 0.001
    """Weight of fooling the critic."""
    local: NonNegative = 40.0
    """What full disagreement of the class layers adds to a target pixel's weight (the paper's λ_local)."""
    base: NonNegative = 0.4
    """Weight of a target pixel on which both class layers agree (the paper's ε)."""
    preheat: Whole = 500
    """Steps in which every target pixel weighs 1, until the second class layer is trained; the published code takes a
    twentieth of all steps."""
    apart: NonNegative = 0.01
    """Weight of the cosine between the class layers' weights."""

    def networks(self, student: nn.Module) -> TwinsWithCritic:
        """The student, a second class layer, a critic."""
        return TwinsWithCritic(student)

    def losses(self, nets: TwinsWithCritic, batch: Batch) -> Losses:
        """The criterion on the source, for both; weights apart; the student fools the critic, which learns."""
        (source, target), _ = look(nets.student, nets.twin, batch.source.image, batch.target)
        weight = self.base + self.local * disagreement(target) if int(nets.steps) >= self.preheat else None
        return {
            **self.supervised(source.logits, batch.source.label),
            **{f"twin_{key}": loss for key, loss in self.supervised(Logits(source.twin), batch.source.label).items()},
            "apart": self.apart * alignment(class_layer(nets.student), nets.twin),
            "fool": self.weight * fool(nets.critic, ensemble(target), weight),
            "critic": tell_apart(nets.critic, ensemble(source), ensemble(target), weight),
        }

    def after_step(self, nets: TwinsWithCritic, step: int) -> None:
        """Count the step."""
        nets.steps.fill_(step + 1)

    def optimizers(self, nets: TwinsWithCritic, optim: Optim) -> list[Optimizer]:
        """The student's, the critic's and the second class layer's."""
        return [*super().optimizers(nets, optim), twin_optimizer(nets.twin, optim)]


def ensemble(views: Views) -> Tensor:
    """Class probabilities (B, K, H, W) of the summed scores of both class layers."""
    return probabilities(views.logits.main + views.twin)


def disagreement(views: Views) -> Tensor:
    """One minus the cosine of both class layers' probabilities, at each pixel (B, H, W): 0 to 1 (equation 4)."""
    return 1 - F.cosine_similarity(probabilities(views.logits.main), probabilities(views.twin), dim=1)


def alignment(first: nn.Module, second: nn.Module) -> Tensor:
    """Cosine between the kernels of two layers of one form, -1 to 1 (equation 3); biases and normalization left out."""
    one, other = (torch.cat([p.flatten() for p in layer.parameters() if p.ndim > 1]) for layer in (first, second))
    return F.cosine_similarity(one, other, dim=0)
