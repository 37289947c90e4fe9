"""The mean of the weights of networks trained from one start (Wortsman et al., ICML 2022, arXiv:2203.05482)."""

from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from overfly.core.errors import RecipeError
from overfly.core.optimizers import Optim
from overfly.core.records import Batch, Losses
from overfly.core.spec import Share
from overfly.methods.distillation import load_teacher
from overfly.methods.method import Method, Networks


class AverageWeights(Method[Networks], name="average_weights"):
    """Average the weights of networks that were trained from the same start (Wortsman et al., 2022, model soups).

    Weights and batch-normalization statistics of `runs` are averaged with equal weights, and with those of the start by
    `start_share` (Wortsman et al., 2022, WiSE-FT, arXiv:2109.01903). Nothing is trained: one step is enough. Networks
    from different starts, or trained far away from it, do not average to a useful network.
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    runs: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Run folders or weights files of the networks, of the start's architecture, classes and bands."""
    start_share: Share = 0.0
    """Share of the start in the average."""

    @torch.no_grad()
    def networks(self, student: nn.Module) -> Networks:
        """The student with averaged weights.

        Raises `RecipeError`: a network does not exist, or has other weights, classes, bands or value range than the
        start, and `WeightsError`: a file is damaged.
        """
        states = [load_teacher(path, student, setting="method.runs").state_dict() for path in self.runs]
        own = student.state_dict()
        for path, state in zip(self.runs, states, strict=True):
            if {name: value.shape for name, value in state.items()} != {name: own[name].shape for name in own}:
                raise RecipeError(f"method.runs: {path} is not a network of the start's architecture; give those of it")
        for name, value in own.items():
            if value.is_floating_point():
                mean = torch.stack([state[name].double() for state in states]).mean(0)
                value.copy_(torch.lerp(mean, value.double(), self.start_share))
        return Networks(student.requires_grad_(False))

    def losses(self, nets: Networks, batch: Batch) -> Losses:  # noqa: ARG002
        """No loss."""
        return {}

    def optimizers(self, nets: Networks, optim: Optim) -> list[Optimizer]:  # noqa: ARG002
        return []
