from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.core.records import IGNORE
from overfly.methods.dacs import local_quality, rare_class_weights
from overfly.ops.pseudo_labels import class_shares


def test_shares_leave_ignored_pixels_out() -> None:
    label = torch.tensor([[[0, 0, 0, IGNORE], [1, IGNORE, IGNORE, IGNORE]]])
    assert class_shares(label, 3).tolist() == [[0.75, 0.25, 0.0]]
    assert torch.allclose(class_shares(torch.full((1, 2, 2), IGNORE), 4), torch.full((1, 4), 0.25))


def test_rare_class_weights_are_larger_with_mean_1() -> None:
    weights = rare_class_weights(torch.tensor([0.6, 0.3, 0.1]), 0.1)
    assert weights[0] < weights[1] < weights[2]
    assert abs(weights.mean().item() - 1) < 1e-6
    assert torch.allclose(weights[2] / weights[1], torch.tensor(0.2 / 0.1).exp())
    assert torch.allclose(rare_class_weights(torch.full((5,), 0.2), 0.1), torch.ones(5))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([1, 3, 5, 7]))
def test_local_quality_is_the_share_of_confident_pixels_in_the_window(seed: int, size: int) -> None:
    probability = torch.rand(1, 9, 6, generator=torch.Generator().manual_seed(seed))
    result = local_quality(probability, 0.7, size)
    reach = size // 2
    for y in range(9):
        for x in range(6):
            around = probability[0, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
            assert abs(result[0, y, x].item() - (around >= 0.7).float().mean().item()) < 1e-5
