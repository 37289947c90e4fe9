from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from overfly.core.errors import RecipeError
from overfly.methods.adversarial import Critic, adversarial_loss, critic_loss, forward_detached, forward_frozen


def test_the_critic_is_the_published_one() -> None:
    critic = Critic(7)
    shapes = [tuple(p.shape) for p in critic.parameters() if p.ndim == 4]
    assert shapes == [(64, 7, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
    assert isinstance(critic[-1], nn.Conv2d)
    assert critic(torch.zeros(2, 7, 64, 96)).shape == (2, 1, 2, 3)
    assert critic(torch.zeros(1, 7, 32, 33)).shape == (1, 1, 1, 1)


def test_maps_below_min_side_raise() -> None:
    with pytest.raises(RecipeError, match=r"crop .*32"):
        Critic(2)(torch.zeros(1, 2, 31, 64))


def test_forward_frozen_and_forward_detached_send_gradients_one_way() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(4, 2, 5, 5, requires_grad=True)
    answer = forward_frozen(module, x)
    torch.autograd.backward((answer**3).sum())
    assert x.grad is not None
    assert x.grad.any()
    assert all(parameter.grad is None for parameter in module.parameters())
    x.grad = None
    torch.testing.assert_close(forward_detached(module, x), answer)
    torch.autograd.backward((forward_detached(module, x) ** 3).sum())
    assert x.grad is None
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Constant(nn.Module):
    """A critic with constant scores."""

    def __init__(self, score: float) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.tensor(score))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.score.expand(len(maps), 1, 2, 2)


def test_adversarial_and_critic_loss_are_binary_cross_entropy() -> None:
    maps = torch.zeros(2, 1, 64, 64)
    source = 1 / (1 + math.exp(-2.0))  # the critic's probability of the source
    assert adversarial_loss(Constant(2.0), maps).item() == pytest.approx(-math.log(source))
    assert critic_loss(Constant(2.0), maps, maps).item() == pytest.approx(
        (-math.log(source) - math.log(1 - source)) / 2
    )
    weight = torch.zeros(2, 64, 64)
    weight[0] = 3.0
    assert adversarial_loss(Constant(2.0), maps, weight).item() == pytest.approx(-1.5 * math.log(source))
    assert critic_loss(Constant(2.0), maps, maps, weight).item() == pytest.approx(
        (-math.log(source) - 1.5 * math.log(1 - source)) / 2
    )
