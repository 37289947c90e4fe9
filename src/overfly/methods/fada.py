"""FADA: class-aware adversarial feature alignment (Wang et al., ECCV 2020, arXiv:2007.09222)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overfly.core.errors import RecipeError
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import NonNegativeFloat, PositiveFloat, Share
from overfly.methods.adversarial import Adversarial, StudentCritic, forward_frozen, student_outputs
from overfly.ops.losses import probabilities
from overfly.ops.normalization import joint_forward


class FADA(Adversarial[StudentCritic], name="fada"):
    """Align the encoder's features class by class with a critic of domain and class (Wang et al., 2020).

    The critic has two channels per class, source and target. Its labels are the network's own softened predictions in
    the channels of the image's domain; the student is trained so that target features score as source features of the
    same classes. Source and target share one forward pass. The paper's final self-distillation is left out.
    """

    weight: NonNegativeFloat = 0.001
    """Weight of the adversarial loss."""
    temperature: PositiveFloat = 1.8
    """Temperature of the softmax of the soft labels."""
    max_probability: Share = 0.9
    """Upper limit of the soft labels, so that confident classes do not dominate; 1: no limit."""

    def networks(self, student: nn.Module) -> StudentCritic:
        """The student and a critic of its features; raise `RecipeError` if the network returns no features."""
        outputs = student_outputs(student)
        if outputs.features is None:
            name = getattr(student, "architecture", "this network")
            raise RecipeError(f"method fada needs a network that returns features, and {name} returns none")
        return StudentCritic(student, class_critic(outputs.features.shape[1], outputs.main.shape[1]))

    def losses(self, nets: StudentCritic, batch: Batch) -> Losses:
        """Supervised loss on the source; adversarial losses of the student's features and of the critic."""
        source, target = joint_forward(nets.student, batch.source.image, batch.target)
        source_features, target_features = features(source), features(target)
        source_label, target_label = self.soft_label(source), self.soft_label(target)
        true = soft_cross_entropy(nets.critic(source_features.detach()), source_channels(source_label))
        false = soft_cross_entropy(nets.critic(target_features.detach()), target_channels(target_label))
        scores = forward_frozen(nets.critic, target_features)
        return {
            **self.supervised(source, batch.source.label),
            "adversarial": self.weight * soft_cross_entropy(scores, source_channels(target_label)),
            "critic": (true + false) / 2,
        }

    def soft_label(self, logits: Logits) -> Tensor:
        """Softened class probabilities (B, K, h, w), detached, at the size of the features."""
        probability = probabilities(logits.main.detach() / self.temperature)
        height, width = features(logits).shape[-2:]
        return F.adaptive_avg_pool2d(probability, (height, width)).clamp(max=self.max_probability)


def class_critic(channels: int, classes: int) -> nn.Sequential:
    """Critic of features (B, F, h, w): 3×3 convolutions of stride 1, widths 512-256-2K, leaky ReLU of slope 0.2."""
    return nn.Sequential(
        nn.Conv2d(channels, 512, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(512, 256, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(256, 2 * classes, 3, padding=1),
    )


def source_channels(label: Tensor) -> Tensor:
    """Soft labels of domain and class (B, 2K, h, w), from soft class labels (B, K, h, w) of the source."""
    return torch.cat([label, torch.zeros_like(label)], 1)


def target_channels(label: Tensor) -> Tensor:
    """Soft labels of domain and class (B, 2K, h, w), from soft class labels (B, K, h, w) of the target."""
    return torch.cat([torch.zeros_like(label), label], 1)


def soft_cross_entropy(scores: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of scores (B, C, h, w) with soft labels (B, C, h, w), mean over the pixels."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # under autocast too
    return -(label * scores.log_softmax(1)).sum(1).mean()


def features(logits: Logits) -> Tensor:
    """The features (B, F, h, w) of a network that `FADA.networks` has accepted."""
    assert logits.features is not None  # noqa: S101 - checked by `networks`
    return logits.features
