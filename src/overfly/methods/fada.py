"""FADA: a critic that knows classes (Wang et al., ECCV 2020, arXiv:2007.09222)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.errors import RecipeError
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import NonNegative, Positive, Share
from overfly.methods.adversarial import Adversarial, WithCritic, outline
from overfly.ops.adversarial import frozen
from overfly.ops.losses import probabilities
from overfly.ops.normalization import together


class FADA(Adversarial[WithCritic], name="fada"):
    """Align features class by class: the critic says domain and class at once (Wang et al., 2020).

    The critic reads the encoder's features and has two channels a class, "of the source" and "of the target". Its truth
    is the network's own softened prediction, put into the half of the image's domain; the student's features fool it
    into the same classes of the source. Source and target pass the student in one batch: its batch normalization has
    the statistics of both. The paper's closing self-distillation is a self-training of its own and not part of this.
    """

    weight: NonNegative = 0.001
    """Weight of fooling the critic."""
    temperature: Positive = 1.8
    """What class scores are divided by before the softmax of the soft labels."""
    ceiling: Share = 0.9
    """Soft labels above this are cut to it, as published, so that sure classes do not rule; 1 leaves them whole."""

    def networks(self, student: nn.Module) -> WithCritic:
        """The student and a critic of its features.

        Raises:
            RecipeError: the network gives no features.
        """
        found = outline(student)
        if found.features is None:
            name = getattr(student, "architecture", "this network")
            raise RecipeError(f"method fada aligns features, and {name} gives none; choose another model")
        return WithCritic(student, class_critic(found.features.shape[1], found.main.shape[1]))

    def losses(self, nets: WithCritic, batch: Batch) -> Losses:
        """The criterion on the source; the student's features fool the critic; it learns domain and class."""
        source, target = together(nets.student, batch.source.image, batch.target)
        source_seen, target_seen = features(source), features(target)
        source_class, target_class = self.soft_label(source), self.soft_label(target)
        true = soft_cross_entropy(nets.critic(source_seen.detach()), of_source(source_class))
        false = soft_cross_entropy(nets.critic(target_seen.detach()), of_target(target_class))
        return {
            **self.supervised(source, batch.source.label),
            "fool": self.weight * soft_cross_entropy(frozen(nets.critic, target_seen), of_source(target_class)),
            "critic": (true + false) / 2,
        }

    def soft_label(self, logits: Logits) -> Tensor:
        """The network's softened belief in each class (B, K, h, w), without gradient, at the size of its features."""
        belief = probabilities(logits.main.detach() / self.temperature)
        height, width = features(logits).shape[-2:]
        return F.adaptive_avg_pool2d(belief, (height, width)).clamp(max=self.ceiling)


def class_critic(channels: int, classes: int) -> nn.Sequential:
    """The critic of features (B, F, h, w): 3×3 convolutions of stride 1, widths 512-256-2K, leaky by 0.2."""
    return nn.Sequential(
        nn.Conv2d(channels, 512, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(512, 256, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(256, 2 * classes, 3, padding=1),
    )


def of_source(belief: Tensor) -> Tensor:
    """Truth (B, 2K, h, w) for a critic of domain and class, from class beliefs (B, K, h, w) of the source."""
    return torch.cat([belief, torch.zeros_like(belief)], 1)


def of_target(belief: Tensor) -> Tensor:
    """Truth (B, 2K, h, w) for a critic of domain and class, from class beliefs (B, K, h, w) of the target."""
    return torch.cat([torch.zeros_like(belief), belief], 1)


def soft_cross_entropy(scores: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of scores (B, C, h, w) with a distribution (B, C, h, w), mean over the places."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # under autocast too
    return -(truth * scores.log_softmax(1)).sum(1).mean()


def features(logits: Logits) -> Tensor:
    """The features (B, F, h, w), which `FADA.networks` has seen to be there."""
    if logits.features is None:
        raise ValueError("the network gives no features")
    return logits.features
