"""What adversarial methods share: a critic beside the student, and the levels that it judges."""

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
from overfly.ops.adversarial import Critic, fool, tell_apart

Levels = Literal["single", "multi"]
"""The main scores alone, or those of the first auxiliary head too."""


class WithCritic(Networks):
    """A student and the critic that it learns to fool."""

    def __init__(self, student: nn.Module, critic: nn.Module) -> None:
        super().__init__(student)
        self.critic = critic


C = TypeVar("C", bound=WithCritic)


class Adversarial(Method[C], Generic[C]):
    """A method whose student fools a critic; the critic has an optimizer of its own."""

    critic: Optim = Adam(lr=1e-4, betas=(0.9, 0.99))
    """How the critic's weights follow gradients; its rate falls with the recipe's schedule."""

    def optimizers(self, nets: C, optim: Optim) -> list[Optimizer]:
        """The student's and the critic's."""
        return [*super().optimizers(nets, optim), self.critic.optimizer(nets.critic)]


@torch.no_grad()
def outline(student: nn.Module) -> Logits:
    """What a student gives for one blank picture: how many classes, heads and features it has."""
    modes = {part: part.training for part in student.modules()}
    like = next(student.parameters())
    blank = torch.zeros(1, int(getattr(student, "bands", 3)), 64, 64, dtype=like.dtype, device=like.device)
    found: Logits = student.eval()(blank)
    for part, mode in modes.items():
        part.training = mode
    return found


def outputs(logits: Logits, levels: Levels) -> list[Tensor]:
    """The scores (B, K, H, W) of each level: main, and with ``multi`` auxiliary."""
    return [logits.main] if levels == "single" else [logits.main, logits.aux[0]]


def check_levels(student: nn.Module, levels: Levels) -> None:
    """Refuse two levels where the student has one.

    Raises:
        RecipeError: there is no auxiliary head.
    """
    if levels == "multi" and not outline(student).aux:
        name = getattr(student, "architecture", "this network")
        raise RecipeError(f"method.levels=multi needs an auxiliary head, and {name} has none; set method.levels=single")


def critics(student: nn.Module, levels: Levels) -> nn.ModuleList:
    """One critic a level, for maps of K channels."""
    check_levels(student, levels)
    classes = outline(student).main.shape[1]
    return nn.ModuleList(Critic(classes) for _ in range(1 if levels == "single" else 2))


def play(
    judges: Iterable[nn.Module], source: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[float]
) -> Losses:
    """Both sides' terms of the game at each level: ``fool`` and ``critic``, at the second ``fool_aux``, ``critic_aux``.

    Args:
        judges: one critic a level.
        source: maps of source images (B, C, H, W), one tensor a level.
        target: maps of target images, the same.
        weights: weight of each level's ``fool``.
    """
    terms: dict[str, Tensor] = {}
    for suffix, judge, of_source, of_target, weight in zip(("", "_aux"), judges, source, target, weights, strict=False):
        terms[f"fool{suffix}"] = weight * fool(judge, of_target)
        terms[f"critic{suffix}"] = tell_apart(judge, of_source, of_target)
    return terms
