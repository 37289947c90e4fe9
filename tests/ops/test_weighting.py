from __future__ import annotations

import torch

from overfly.core.records import IGNORE
from overfly.ops.weighting import class_shares, rare_class_weights


def test_shares_leave_ignored_pixels_out() -> None:
    label = torch.tensor([[[0, 0, 0, IGNORE], [1, IGNORE, IGNORE, IGNORE]]])
    assert class_shares(label, 3).tolist() == [0.75, 0.25, 0.0]
    assert torch.allclose(class_shares(torch.full((1, 2, 2), IGNORE), 4), torch.full((4,), 0.25))


def test_rare_classes_weigh_more_with_a_mean_of_1() -> None:
    weights = rare_class_weights(torch.tensor([0.6, 0.3, 0.1]), 0.1)
    assert weights[0] < weights[1] < weights[2]
    assert abs(weights.mean().item() - 1) < 1e-6
    assert torch.allclose(weights[2] / weights[1], torch.tensor(0.2 / 0.1).exp())
    assert torch.allclose(rare_class_weights(torch.full((5,), 0.2), 0.1), torch.ones(5))
