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
from overfly.methods.distillation import load_teacher
from overfly.methods.method import Method, Networks


class AverageWeights(Method[Networks], name="average_weights"):
    """Average the weights of networks that were trained from the same start (Wortsman et al., 2022, model soups).

    Weights and batch-normalization statistics of `runs` have equal parts. Nothing is trained: one step is enough.
    Networks from different starts, or trained far away from it, do not average to a useful network.
    """

    needs_source: ClassVar[bool] = False
    needs_start: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    runs: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Run folders or weights files of the networks, of the start's architecture, classes and bands."""

    @torch.no_grad()
    def networks(self, student: nn.Module) -> Networks:
        """The student with averaged weights.

        Raises `RecipeError`: a network does not exist, or has other weights, classes, bands or value range than the
        start, and `WeightsError`: a file is damaged.
        """
        own = student.state_dict()
        states = [load_teacher(path, student, setting="method.runs").state_dict() for path in self.runs]
        for path, state in zip(self.runs, states, strict=True):
            if {name: value.shape for name, value in state.items()} != {
                name: value.shape for name, value in own.items()
            }:
                raise RecipeError(f"method.runs: {path} is not a network of the start's architecture; leave it out")
        for name, value in own.items():
            if value.is_floating_point():
                value.copy_(torch.stack([state[name].double() for state in states]).mean(0))
        return Networks(student.requires_grad_(False))

    def losses(self, nets: Networks, batch: Batch) -> Losses:  # noqa: ARG002
        """No loss."""
        return {}

    def optimizers(self, nets: Networks, optim: Optim) -> list[Optimizer]:  # noqa: ARG002
        return []
