"""Domain critics (discriminators), adversarial losses, and the base class of adversarial methods.

Student and critic are trained in one step, without a second loop: the student's loss uses the critic with detached
weights, the critic's loss uses detached maps. The gradients of the sum equal those of the classic two-phase update.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.errors import RecipeError
from overfly.core.optimizers import Adam, Optim
from overfly.core.records import Logits, Losses
from overfly.methods.method import Method, Networks
from overfly.ops.normalization import probe_outputs

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


@torch.no_grad()
def student_outputs(student: nn.Module) -> Logits:
    """Return the output of a student for one empty image, to read numbers of classes, heads and features."""
    return probe_outputs(student, int(getattr(student, "bands", 3)))


def level_scores(logits: Logits, levels: Levels) -> list[Tensor]:
    """The scores (B, K, H, W) of each level: main, and with ``multi`` auxiliary."""
    return [logits.main] if levels == "single" else [logits.main, logits.aux[0]]


def check_levels(student: nn.Module, levels: Levels) -> None:
    """Raise `RecipeError` unless the student has the outputs of ``levels``."""
    if levels == "multi" and not student_outputs(student).aux:
        name = getattr(student, "architecture", "this network")
        raise RecipeError(f"method.levels=multi needs an auxiliary head, and {name} has none; set single")


def level_critics(student: nn.Module, levels: Levels) -> nn.ModuleList:
    """One critic of maps of K channels per level."""
    check_levels(student, levels)
    classes = student_outputs(student).main.shape[1]
    return nn.ModuleList(Critic(classes) for _ in range(1 if levels == "single" else 2))


def adversarial_terms(
    critics: Iterable[nn.Module], source: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[float]
) -> Losses:
    """The student's and the critic's loss at each level: ``adversarial`` and ``critic``, the second level as ``_aux``.

    Args:
        critics: one per level.
        source: maps of source images (B, C, H, W), one tensor per level.
        target: maps of target images, the same.
        weights: weight of the student's loss at each level.
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
    """The student's loss: binary cross-entropy of the critic taking target maps for source maps.

    Args:
        critic: its weights get no gradient.
        target: maps of target images (B, C, H, W).
        weight: of each pixel (B, H, W); None: 1.

    Returns:
        A scalar, the mean over the scores.
    """
    return _cross_entropy(forward_frozen(critic, target), True, weight)


def critic_loss(critic: nn.Module, source: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The critic's loss: binary cross-entropy of telling source maps from target maps.

    Args:
        critic: the module that is trained.
        source: maps of source images (B, C, H, W); they get no gradient.
        target: maps of target images (B, C, H, W); they get no gradient.
        weight: of each pixel of the target (B, H, W), detached here; None: 1.

    Returns:
        A scalar, the mean of both domains' losses.
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
