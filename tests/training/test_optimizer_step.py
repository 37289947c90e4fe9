"""Several optimizers and one scale of the loss; the scale itself is PyTorch's, on the processor here."""

from __future__ import annotations

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import SGD

from overfly.training.trainer import optimizer_step


class Two(nn.Module):
    """A weight of the student and one of the critic."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))


def scaled(first: float, second: float | None, clip: float | None) -> tuple[Two, torch.amp.GradScaler]:
    """One move of two optimizers by gradients that the loss's scale was multiplied into; None: no gradient."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fabric = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))
    module = Two()
    optimizers = [fabric.setup_optimizers(SGD([value], lr=1.0)) for value in (module.one, module.other)]
    scaler.scale(torch.zeros(()))  # makes the scale known
    module.one.grad = torch.tensor(first) * scaler.get_scale()
    module.other.grad = None if second is None else torch.tensor(second) * scaler.get_scale()
    optimizer_step(fabric, module, optimizers, clip)
    return module, scaler


@pytest.mark.parametrize("clip", [None, 10.0])
def test_each_optimizer_takes_the_same_step(clip: float | None) -> None:
    module, _ = scaled(0.1, 0.1, clip)
    assert module.one.item() == pytest.approx(0.9)
    assert module.other.item() == pytest.approx(0.9)
    assert module.one.grad is None
    assert module.other.grad is None


def test_gradients_are_clipped_as_they_are_and_not_as_they_were_scaled() -> None:
    module, _ = scaled(4.0, 0.1, 1.0)
    assert module.one.item() == pytest.approx(0.0, abs=1e-5)
    assert module.other.item() == pytest.approx(0.9)


def test_where_the_first_overflows_the_second_still_steps_by_its_own_gradient() -> None:
    module, scaler = scaled(float("inf"), 0.1, None)
    assert module.one.item() == 1.0
    assert module.other.item() == pytest.approx(0.9)
    assert scaler.get_scale() == 2.0**9


def test_one_without_gradients_is_passed_over() -> None:
    module, _ = scaled(0.1, None, 1.0)
    assert module.one.item() == pytest.approx(0.9)
    assert module.other.item() == 1.0
