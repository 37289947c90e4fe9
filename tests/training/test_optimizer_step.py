"""Two optimizers that share PyTorch's loss scale, on the CPU."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import SGD

from overfly.training.engine import optimizer_step


class TwoWeights(nn.Module):
    """A weight of the student and one of the critic."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))


def step_with_scale(first: float, second: float | None, clip: float | None) -> tuple[TwoWeights, torch.amp.GradScaler]:
    """Step two optimizers with gradients that are multiplied by the loss scale; None: no gradient."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fabric = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))
    module = TwoWeights()
    optimizers = [fabric.setup_optimizers(SGD([value], lr=1.0)) for value in (module.one, module.other)]
    scaler.scale(torch.zeros(()))  # initializes the scale
    module.one.grad = torch.tensor(first) * scaler.get_scale()
    module.other.grad = None if second is None else torch.tensor(second) * scaler.get_scale()
    optimizer_step(fabric, module, optimizers, clip)
    return module, scaler


@pytest.mark.parametrize("clip", [None, 10.0])
def test_each_optimizer_takes_the_same_step(clip: float | None) -> None:
    module, _ = step_with_scale(0.1, 0.1, clip)
    assert module.one.item() == pytest.approx(0.9)
    assert module.other.item() == pytest.approx(0.9)
    assert module.one.grad is None
    assert module.other.grad is None


def test_gradients_are_unscaled_before_clipping() -> None:
    module, _ = step_with_scale(4.0, 0.1, 1.0)
    assert module.one.item() == pytest.approx(0.0, abs=1e-5)
    assert module.other.item() == pytest.approx(0.9)


def test_overflow_of_one_optimizer_does_not_change_the_other_step() -> None:
    module, scaler = step_with_scale(float("inf"), 0.1, None)
    assert module.one.item() == 1.0
    assert module.other.item() == pytest.approx(0.9)
    assert scaler.get_scale() == 2.0**9


def test_optimizer_without_gradients_is_skipped() -> None:
    module, _ = step_with_scale(0.1, None, 1.0)
    assert module.one.item() == pytest.approx(0.9)
    assert module.other.item() == 1.0
