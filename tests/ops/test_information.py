from __future__ import annotations

import math

import torch

from overfly.ops.information import charbonnier_entropy, distance_to_uniform, diversity
from overfly.ops.losses import mean_entropy


def one_class(classes: torch.Tensor, sure: float = 50.0) -> torch.Tensor:
    return sure * torch.nn.functional.one_hot(classes, 4).permute(0, 3, 1, 2).float()


def test_collapsed_predictions_have_no_diversity_and_balanced_ones_all() -> None:
    collapsed = one_class(torch.zeros(1, 4, 4, dtype=torch.int64))
    balanced = one_class(torch.arange(16).view(1, 4, 4) % 4)
    assert diversity(collapsed) < 1e-4
    assert abs(diversity(balanced) - 1) < 1e-4
    assert mean_entropy(balanced) < 1e-4  # sure and varied at once
    logits = torch.randn(2, 4, 3, 3).requires_grad_()
    mean = logits.softmax(1).mean((0, 2, 3))
    assert torch.allclose(diversity(logits), -(mean * mean.log()).sum() / math.log(4))
    diversity(collapsed.requires_grad_()).backward()  # type: ignore[no-untyped-call]
    assert collapsed.grad is not None
    assert collapsed.grad.isfinite().all()


def test_the_robust_entropy_weighs_high_ones_more() -> None:
    uniform, sure = torch.zeros(1, 4, 2, 2), one_class(torch.zeros(1, 2, 2, dtype=torch.int64))
    assert abs(charbonnier_entropy(uniform) - 1) < 1e-4
    assert charbonnier_entropy(sure) < 1e-6
    middle = 1.5 * one_class(torch.zeros(1, 2, 2, dtype=torch.int64), 1.0)
    assert charbonnier_entropy(middle) < mean_entropy(middle)


def test_distance_to_uniform() -> None:
    everywhere = torch.ones(1, 2, 2, dtype=torch.bool)
    assert abs(distance_to_uniform(torch.zeros(1, 4, 2, 2), everywhere)) < 1e-6
    logits = torch.randn(1, 4, 2, 2)
    expected = torch.stack([0.25 * (0.25 / p).log() for p in logits.softmax(1).unbind(1)]).sum(0)
    where = torch.tensor([[[True, False], [False, True]]])
    assert torch.allclose(distance_to_uniform(logits, where), expected[where].mean())
    assert distance_to_uniform(logits, ~everywhere) == 0
