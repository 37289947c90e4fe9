"""Adversarial methods: critics (discriminators), losses, base class, and the methods with a critic of one output.

AdaptSegNet (Tsai et al., CVPR 2018, arXiv:1802.10349); ADVENT, MinEnt (Vu et al., CVPR 2019, arXiv:1811.12833); FADA
(Wang et al., ECCV 2020, arXiv:2007.09222). Student and critic are trained in one step: the student's loss uses the
critic with detached weights, the critic's loss detached maps; the gradients of the sum equal those of two phases.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.errors import RecipeError
from overfly.core.optimizers import Adam, Optim
from overfly.core.records import Batch, Logits, Losses
from overfly.core.spec import NonNegativeFloat, PositiveFloat, Share
from overfly.methods.method import Method, Networks
from overfly.ops.losses import mean_entropy, probabilities, self_information
from overfly.ops.normalization import joint_forward, probe_outputs

Levels = Literal["single", "multi"]
"""The main scores alone, or those of the first auxiliary head too."""
MIN_SIDE = 32
"""Smallest side of the maps that a `Critic` accepts, in pixels."""


class StudentCritic(Networks):
    """A student and a critic."""

    def __init__(self, student: nn.Module, critic: nn.Module) -> None:
        super().__init__(student)
        self.critic = critic


C = TypeVar("C", bound=StudentCritic)


class Adversarial(Method[C], Generic[C]):
    """A method with a critic, which has an optimizer of its own."""

    critic: Optim = Adam(lr=1e-4, betas=(0.9, 0.99))
    """Optimizer of the critic; its learning rate follows the recipe's schedule."""

    def optimizers(self, nets: C, optim: Optim) -> list[Optimizer]:
        return [*super().optimizers(nets, optim), self.critic.optimizer(nets.critic)]


def level_scores(logits: Logits, levels: Levels) -> list[Tensor]:
    """The scores (B, K, H, W) of each level: main, and with ``multi`` auxiliary."""
    return [logits.main] if levels == "single" else [logits.main, logits.aux[0]]


def check_levels(student: nn.Module, levels: Levels) -> None:
    """Raise `RecipeError` unless the student has the outputs of ``levels``."""
    if levels == "multi" and not probe_outputs(student).aux:
        name = getattr(student, "architecture", "this network")
        raise RecipeError(f"method.levels=multi needs an auxiliary head, and {name} has none; set single")


def level_critics(student: nn.Module, levels: Levels) -> nn.ModuleList:
    """One critic of maps of K channels per level."""
    check_levels(student, levels)
    classes = probe_outputs(student).main.shape[1]
    return nn.ModuleList(Critic(classes) for _ in range(1 if levels == "single" else 2))


def adversarial_terms(
    critics: Iterable[nn.Module], source: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[float]
) -> Losses:
    """The student's and the critic's loss at each level: ``adversarial`` and ``critic``, the second level as ``_aux``.

    Each level has a critic, maps (B, C, H, W) of source and target images, and a weight of the student's loss.
    """
    terms: dict[str, Tensor] = {}
    levels = zip(("", "_aux"), critics, source, target, weights, strict=False)
    for suffix, critic, source_map, target_map, weight in levels:
        terms[f"adversarial{suffix}"] = weight * adversarial_loss(critic, target_map)
        terms[f"critic{suffix}"] = critic_loss(critic, source_map, target_map)
    return terms


class Critic(nn.Sequential):
    """Fully convolutional critic: 4×4 convolutions of stride 2, widths 64-128-256-512-1, leaky ReLU of slope 0.2.

    Maps (B, C, H, W) to scores (B, 1, ⌊H/32⌋, ⌊W/32⌋) before the sigmoid; above 0 means source. Source: AdaptSegNet
    (Tsai et al., 2018), section 4.1, after DCGAN.

    Args:
        channels: C of the maps.
    """

    def __init__(self, channels: int) -> None:
        widths = (channels, 64, 128, 256, 512, 1)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, padding=1), nn.LeakyReLU(0.2)]
        super().__init__(*layers[:-1])

    def forward(self, maps: Tensor) -> Tensor:
        """Scores of maps (B, C, H, W); raise `RecipeError` if a side is below `MIN_SIDE`."""
        height, width = maps.shape[-2:]
        if min(height, width) < MIN_SIDE:
            raise RecipeError(f"crop must be at least {MIN_SIDE} for a critic, got maps of {height}×{width} pixels")
        for layer in self:
            maps = layer(maps)
        return maps


def forward_frozen(module: nn.Module, x: Tensor) -> Tensor:
    """Output of a module with detached weights: gradients reach ``x`` only, buffers do not change."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    scores: Tensor = torch.func.functional_call(module, weights | _copied_buffers(module), (x,))
    return scores


def forward_detached(module: nn.Module, x: Tensor) -> Tensor:
    """Output of a module for detached ``x``: gradients reach its weights only, buffers do not change."""
    scores: Tensor = torch.func.functional_call(module, _copied_buffers(module), (x.detach(),))
    return scores


def adversarial_loss(critic: nn.Module, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The student's loss: mean binary cross-entropy of the critic taking target maps (B, C, H, W) for source maps.

    ``weight`` is that of each pixel (B, H, W); None: 1. The critic's weights get no gradient.
    """
    return _cross_entropy(forward_frozen(critic, target), True, weight)


def critic_loss(critic: nn.Module, source: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The critic's loss: binary cross-entropy of telling source maps from target maps, the mean of both domains.

    Maps (B, C, H, W) and the weight of each target pixel (B, H, W) get no gradient; None: 1.
    """
    true = _cross_entropy(critic(source.detach()), True)
    false = _cross_entropy(critic(target.detach()), False, None if weight is None else weight.detach())
    return (true + false) / 2


def _cross_entropy(scores: Tensor, is_source: bool, weight: Tensor | None = None) -> Tensor:
    if weight is not None:
        scores = F.interpolate(scores, size=weight.shape[-2:], mode="bilinear", align_corners=False)
        weight = weight[:, None]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # under autocast too
    loss = F.softplus(-scores if is_source else scores)
    return loss.mean() if weight is None else (weight * loss).mean()


def _copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


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
        outputs = probe_outputs(student)
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
        nn.Conv2d(channels, 512, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(512, 256, 3, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(256, 2 * classes, 3, padding=1),
    )  # fmt: skip


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
