from __future__ import annotations

import pytest
import torch

from overfly.ops.masking import block_mask, cover


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_the_share_of_covered_squares(ratio: float) -> None:
    torch.manual_seed(0)
    mask = block_mask(torch.zeros(8, 3, 64, 64), 4, ratio)
    assert mask.shape == (8, 1, 64, 64)
    assert abs(mask.float().mean().item() - ratio) < 0.03


def test_squares_are_covered_whole_and_the_last_may_be_cut() -> None:
    torch.manual_seed(0)
    mask = block_mask(torch.zeros(2, 1, 20, 13), 8, 0.5)
    assert mask.shape == (2, 1, 20, 13)
    for top in range(0, 20, 8):
        for left in range(0, 13, 8):
            square = mask[:, 0, top : top + 8, left : left + 8].flatten(1)
            assert (square.all(1) == square.any(1)).all()
    assert 0 < mask.float().mean() < 1


def test_covered_pixels_show_the_mean_color_and_the_others_themselves() -> None:
    image = torch.rand(2, 3, 16, 16)
    mask = block_mask(image, 4, 0.5).expand(-1, 3, -1, -1)
    found = cover(image, mask[:, :1])
    assert torch.equal(found[~mask], image[~mask])
    assert torch.equal(found[mask], image.mean((2, 3), keepdim=True).expand_as(image)[mask])
