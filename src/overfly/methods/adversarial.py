"""Parts that adversarial methods share: a critic beside the student, and the outputs that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core.errors import RecipeError
from overfly.core.optimizers import Adam, Optim
from overfly.core.records import Logits, Losses
from overfly.methods.method import Method, Networks
from overfly.ops.adversarial import Critic, adversarial_loss, critic_loss
from overfly.ops.normalization import probe

Levels = Literal["single", "multi"]
"""The main scores alone, or those of the first auxiliary head too."""


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
        """The student's and the critic's."""
        return [*super().optimizers(nets, optim), self.critic.optimizer(nets.critic)]


@torch.no_grad()
def student_outputs(student: nn.Module) -> Logits:
    """Output of a student for one empty image: its numbers of classes, heads and features."""
    return probe(student, int(getattr(student, "bands", 3)))


def level_scores(logits: Logits, levels: Levels) -> list[Tensor]:
    """The scores (B, K, H, W) of each level: main, and with ``multi`` auxiliary."""
    return [logits.main] if levels == "single" else [logits.main, logits.aux[0]]


def check_levels(student: nn.Module, levels: Levels) -> None:
    """Check that the student has the outputs of ``levels``.

    Raises:
        RecipeError: it has no auxiliary head.
    """
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
