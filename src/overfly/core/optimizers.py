"""Optimizers and learning-rate schedules, as values of a recipe."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import nn

from overfly.core.spec import Choice, NonNegativeFloat, NonNegativeInt, PositiveFloat, Share


class Optim(Choice, ABC):
    """An optimizer with its settings."""

    lr: PositiveFloat = 0.01
    """Maximum learning rate."""
    weight_decay: NonNegativeFloat = 5e-4
    """Strength of weight decay."""
    head: PositiveFloat = 1.0
    """Learning rate of the decoder and class layers, as a multiple of the encoder's."""
    decay_norms: bool = True
    """Apply weight decay to normalization weights and biases too."""

    @abstractmethod
    def create(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """Create the optimizer of these parameter groups."""

    def optimizer(self, module: nn.Module, heads: Iterable[str] = ()) -> torch.optim.Optimizer:
        """Create the optimizer of a module's parameters; modules named in ``heads`` get ``head`` times the rate."""
        prefixes = tuple(heads)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            is_head = any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
            decay = self.weight_decay if self.decay_norms or parameter.ndim > 1 else 0.0
            groups.setdefault((self.lr * (self.head if is_head else 1.0), decay), []).append(parameter)
        return self.create(
            [
                {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay}
                for (lr, decay), parameters in groups.items()
            ]
        )


class SGD(Optim, name="sgd"):
    """Stochastic gradient descent with momentum."""

    momentum: Share = 0.9
    """Momentum."""
    nesterov: bool = False
    """Use Nesterov momentum (1983)."""

    def create(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(groups), lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


class Adam(Optim, name="adam"):
    """Adam (Kingma and Ba, 2015)."""

    lr: PositiveFloat = 1e-3
    """Maximum learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Strength of weight decay, added to the gradient."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and its square."""

    def create(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(list(groups), lr=self.lr, betas=self.betas)


class AdamW(Adam, name="adamw"):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""

    def create(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(groups), lr=self.lr, betas=self.betas)


class Schedule(Choice, ABC):
    """The learning rate over the steps of a run, as a share of its maximum."""

    warmup: NonNegativeInt = 0
    """Steps of linear warm-up."""

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Share of the maximum rate at ``progress`` (0 to 1) through the steps after the warm-up."""

    def factor(self, step: int, steps: int) -> float:
        """Share of the maximum rate at ``step`` (counted from 0) of ``steps``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.shape((step - self.warmup) / max(1, steps - self.warmup))


class Constant(Schedule, name="constant"):
    """A constant rate."""

    def shape(self, progress: float) -> float:  # noqa: ARG002
        return 1.0


class Poly(Schedule, name="poly"):
    """Polynomial decay to zero: (1 - progress) ** power."""

    power: PositiveFloat = 0.9
    """Exponent; 1 is a straight line."""

    def shape(self, progress: float) -> float:
        return float(max(0.0, 1.0 - progress) ** self.power)


class Cosine(Schedule, name="cosine"):
    """Cosine decay from 1 to ``floor``."""

    floor: Share = 0.0
    """Share of the maximum rate at the end."""

    def shape(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class StepDecay(Schedule, name="step"):
    """A lower rate after each milestone."""

    milestones: tuple[Share, ...] = (0.6, 0.9)
    """Steps at which the rate decreases, as shares of all steps."""
    gamma: Share = 0.1
    """Factor at each milestone."""

    def shape(self, progress: float) -> float:
        return float(self.gamma ** sum(progress >= milestone for milestone in self.milestones))


class OneCycle(Schedule, name="one_cycle"):
    """Cosine increase, then cosine decay (Smith and Topin, 2018)."""

    rise: Share = 0.3
    """Share of the steps with an increasing rate."""
    start: Share = 0.04
    """Share of the maximum rate at the first step."""
    end: Share = 4e-6
    """Share of the maximum rate at the last step."""

    @model_validator(mode="after")
    def _valid_rise(self) -> Self:
        if not 0 < self.rise < 1:
            raise ValueError(f"rise must be greater than 0 and less than 1, got {self.rise}")
        return self

    def shape(self, progress: float) -> float:
        if progress < self.rise:
            low, done = self.start, progress / self.rise
            return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * done))
        done = min(1.0, (progress - self.rise) / (1 - self.rise))
        return self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of each group to ``factor`` times its maximum."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
