from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overfly.core.records import IGNORE, Labeled
from overfly.ops.pseudo_labels import block_mask, class_mask, fill_mean_color, paste


def labels(seed: int, classes: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (count, 8, 8), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = IGNORE
    return label


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([0.25, 0.5, 0.7, 1.0]))
def test_a_share_of_the_classes_is_cut_whole_and_never_ignored_pixels(seed: int, classes: int, share: float) -> None:
    label = labels(seed, classes)
    torch.manual_seed(seed)
    mask = class_mask(label, share)
    assert not mask[label == IGNORE].any()
    for each, cut in zip(label, mask, strict=True):
        present = set(each.unique().tolist()) - {IGNORE}
        chosen = set(each[cut].unique().tolist())
        assert all(bool(cut[each == index].all()) for index in chosen)
        if len(present) > 1:
            assert len(chosen) == math.ceil(len(present) * share - 1e-9)


def test_a_single_class_is_chosen_with_the_probability_of_the_share() -> None:
    torch.manual_seed(0)
    single = torch.zeros(400, 2, 2, dtype=torch.int64)
    result = class_mask(single).flatten(1)
    assert 0.4 < result[:, 0].float().mean() < 0.6
    assert (result.all(1) == result.any(1)).all()
    assert not class_mask(torch.full((3, 2, 2), IGNORE)).any()


def test_class_mask_draws_per_image_and_repeats_with_a_seed() -> None:
    label = labels(0, 6, 1).expand(20, -1, -1)
    torch.manual_seed(1)
    first = class_mask(label)
    torch.manual_seed(1)
    assert torch.equal(first, class_mask(label))
    assert len({tuple(mask.flatten().tolist()) for mask in first}) > 5


def test_a_pasted_crop_keeps_its_labels_under_the_mask() -> None:
    over = Labeled(torch.rand(2, 3, 8, 8), labels(1, 4))
    under = Labeled(torch.rand(2, 3, 8, 8), labels(2, 4))
    mask = class_mask(over.label)
    mixed = paste(mask, over, under)
    assert torch.equal(mixed.label[mask], over.label[mask])
    assert torch.equal(mixed.label[~mask], under.label[~mask])
    wide = mask[:, None].expand_as(over.image)
    assert torch.equal(mixed.image[wide], over.image[wide])
    assert torch.equal(mixed.image[~wide], under.image[~wide])


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


def test_cover_fills_masked_pixels_with_the_mean_color() -> None:
    image = torch.rand(2, 3, 16, 16)
    mask = block_mask(image, 4, 0.5).expand(-1, 3, -1, -1)
    result = fill_mean_color(image, mask[:, :1])
    assert torch.equal(result[~mask], image[~mask])
    assert torch.equal(result[mask], image.mean((2, 3), keepdim=True).expand_as(image)[mask])
