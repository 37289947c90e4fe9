from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from overfly.core.errors import RecipeError
from overfly.core.records import IGNORE, Labeled
from overfly.ops.augmentation import Augment
from overfly.ops.geometry import (
    CoarseDropout,
    Dihedral,
    GridDistortion,
    RandomCrop,
    ScaleJitter,
    ShiftScaleRotate,
    affine,
    turn,
    warp,
    zoom,
)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def encoded(
    seed: int, *, count: int = 3, height: int = 32, width: int = 32, block: int = 8, classes: int = 4
) -> Labeled:
    """A label in blocks, and an image with one band a class: 1 where that class is."""
    label = torch.randint(0, classes, (count, height // block, width // block), generator=seeded(seed))
    label = label.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return Labeled(F.one_hot(label, classes).permute(0, 3, 1, 2).float(), label)


def agreement(batch: Labeled) -> Tensor:
    """Whether the label is the class that the image shows, for valid pixels where the image shows one class alone."""
    share, shown = batch.image.max(1)
    clear = (share > 0.999) & (batch.label != IGNORE)
    return (shown == batch.label)[clear]


@given(
    seed=st.integers(0, 1000),
    move=st.sampled_from(
        [ShiftScaleRotate(p=1), GridDistortion(p=1), ScaleJitter(p=1), Dihedral(), RandomCrop(size=24)]
    ),
    size=st.sampled_from([(32, 32), (32, 48), (40, 24)]),
)
@settings(deadline=None, max_examples=60)
def test_image_and_label_are_transformed_alike(seed: int, move: Augment, size: tuple[int, int]) -> None:
    batch = encoded(seed, height=size[0], width=size[1])
    moved = move(batch, seeded(seed))
    agree = agreement(moved)
    assert len(agree) > 0.2 * moved.label.numel()
    assert bool(agree.all())


@pytest.mark.parametrize("move", [ShiftScaleRotate(), GridDistortion(), ScaleJitter(), Dihedral(p=0.5)])
def test_image_and_label_are_transformed_alike_in_part_of_a_batch(move: Augment) -> None:
    batch = encoded(0, count=20)
    moved = move(batch, seeded(0))
    still = (moved.label == batch.label).flatten(1).all(1)
    assert 0 < int(still.sum()) < 20
    assert bool(agreement(moved).all())


@pytest.mark.parametrize("seed", range(5))
def test_a_label_that_is_not_transformed_is_detected(seed: int) -> None:
    batch = encoded(seed)
    moved = ShiftScaleRotate(p=1)(batch, seeded(seed))
    assert not bool(agreement(Labeled(moved.image, batch.label)).all())


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_turns_are_a_group(quarters: int) -> None:
    batch = encoded(0)
    four = batch
    for _ in range(4):
        four = turn(four, 1, mirrored=False)
    back = turn(turn(batch, quarters, mirrored=False), 4 - quarters, mirrored=False)
    twice = turn(turn(batch, quarters, mirrored=True), quarters, mirrored=True)  # a mirroring is its own inverse
    for same in (four, back, twice):
        assert torch.equal(same.image, batch.image)
        assert torch.equal(same.label, batch.label)
    assert not torch.equal(turn(batch, quarters, mirrored=True).label, batch.label)


def test_dihedral_draws_all_eight_on_squares_and_four_else() -> None:
    square = Labeled(
        torch.arange(9.0).view(1, 1, 3, 3).expand(200, 1, 3, 3), torch.arange(9).view(1, 3, 3).expand(200, 3, 3)
    )
    image, label = Dihedral()(square, seeded(0))
    assert torch.equal(image[:, 0].long(), label)
    distinct, counts = torch.unique(label.flatten(1), dim=0, return_counts=True)
    assert len(distinct) == 8
    assert int(counts.min()) > 10
    wide = Labeled(
        torch.arange(6.0).view(1, 1, 2, 3).expand(99, 1, 2, 3), torch.arange(6).view(1, 2, 3).expand(99, 2, 3)
    )
    image, label = Dihedral()(wide, seeded(0))
    assert torch.equal(image[:, 0].long(), label)
    assert len(torch.unique(label.flatten(1), dim=0)) == 4


@given(
    seed=st.integers(0, 1000),
    factor=st.sampled_from([0.5, 0.8, 1.0, 1.7, 2.0]),
    size=st.sampled_from([(32, 32), (24, 40)]),
)
@settings(deadline=None, max_examples=40)
def test_the_class_under_the_center_stays(seed: int, factor: float, size: tuple[int, int]) -> None:
    batch = encoded(seed, height=size[0], width=size[1])
    row = int(torch.randint(0, size[0], (), generator=seeded(seed)))
    column = int(torch.randint(0, size[1], (), generator=seeded(seed + 1)))
    center = torch.tensor([[column + 0.5, row + 0.5]]).expand(3, 2)
    zoomed = zoom(batch, torch.full((3,), factor), center)
    assert torch.equal(zoomed.label[:, row, column], batch.label[:, row, column])
    torch.testing.assert_close(zoomed.image[..., row, column], batch.image[..., row, column], atol=1e-3, rtol=0)


def test_zoom_scales_areas() -> None:
    label = torch.zeros(1, 64, 64, dtype=torch.int64)
    label[:, 24:40, 24:40] = 1
    batch = Labeled(label[:, None].float(), label)
    middle = torch.tensor([[32.0, 32.0]])
    assert int((zoom(batch, torch.tensor([2.0]), middle).label == 1).sum()) == 32 * 32
    small = zoom(batch, torch.tensor([0.5]), middle).label
    assert int((small == 1).sum()) == 8 * 8
    assert int((small == IGNORE).sum()) == 64 * 64 - 32 * 32
    assert bool((small[:, 16:48, 16:48] != IGNORE).all())


def test_identity_is_exact_for_labels() -> None:
    batch = encoded(0, height=24, width=40)
    batch.label[:, 3:5] = IGNORE
    middle = torch.tensor([[20.0, 12.0]]).expand(3, 2)
    same = affine(batch, torch.eye(2).expand(3, 2, 2), middle, middle)
    assert torch.equal(same.label, batch.label)
    torch.testing.assert_close(same.image, batch.image, atol=1e-4, rtol=0)


def test_a_shift_moves_by_pixels_and_ignores_what_comes_in() -> None:
    batch = encoded(0, height=24, width=40)
    start = torch.tensor([[20.0, 12.0]]).expand(3, 2)
    moved = affine(batch, torch.eye(2).expand(3, 2, 2), start, start + torch.tensor([5.0, -2.0]))
    assert torch.equal(moved.label[:, :-2, 5:], batch.label[:, 2:, :-5])
    assert bool((moved.label[:, -2:] == IGNORE).all())
    assert bool((moved.label[:, :, :5] == IGNORE).all())
    mirrored = batch.image[..., 2:, :5].flip(-1)  # beyond its edge an image is mirrored
    torch.testing.assert_close(moved.image[..., :-2, :5], mirrored, atol=1e-4, rtol=0)


def test_a_quarter_rotation_is_rot90() -> None:
    batch = encoded(0)
    middle = torch.tensor([[16.0, 16.0]]).expand(3, 2)
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).expand(3, 2, 2)
    turned, exact = affine(batch, quarter, middle, middle), turn(batch, 1, mirrored=False)
    torch.testing.assert_close(turned.image, exact.image, atol=1e-3, rtol=0)
    assert torch.equal(turned.label, exact.label)


def test_invalid_ranges_raise() -> None:
    still = ShiftScaleRotate(p=1, shift=0, scale=0, rotate=0)
    batch = encoded(1)
    assert torch.equal(still(batch, seeded(0)).label, batch.label)
    shifted = ShiftScaleRotate(p=1, shift=0.25, scale=0, rotate=0)(encoded(1, count=64), seeded(0)).label
    lost = (shifted == IGNORE).all(1).sum(1)
    assert 6 <= int(lost.max()) <= 8
    assert torch.equal(GridDistortion(p=1, limit=0)(batch, seeded(0)).label, batch.label)


def test_rotation_turns_and_neither_shears_nor_stretches() -> None:
    label = torch.zeros(20, 64, 64, dtype=torch.int64)
    label[:, 28:36, 12:52] = 1
    turned = (
        ShiftScaleRotate(p=1, shift=0, scale=0, rotate=90)(Labeled(label[:, None].float(), label), seeded(0)).label == 1
    )
    assert bool(((turned.sum((1, 2)) - 8 * 40).abs() < 16).all())
    place = torch.stack(torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij"))
    spread = torch.stack([(place[:, each] ** 2).sum() / each.sum() for each in turned])  # the same about any axis
    torch.testing.assert_close(spread, torch.full((20,), (8**2 + 40**2 - 2) / 12), atol=8, rtol=0)


def test_grid_distortion_keeps_the_edges() -> None:
    batch = encoded(2, count=8)
    distorted = GridDistortion(p=1)(batch, seeded(0)).label
    assert not (distorted == IGNORE).any()
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.equal(distorted[:, corner[0], corner[1]], batch.label[:, corner[0], corner[1]])
    assert not torch.equal(distorted, batch.label)


def test_random_crops_reach_every_position() -> None:
    place = torch.arange(36).view(1, 6, 6).expand(300, 6, 6)
    batch = Labeled(place[:, None].float(), place)
    image, label = RandomCrop(size=4)(batch, seeded(0))
    assert torch.equal(image[:, 0].long(), label)
    corners = label[:, 0, 0]
    assert set(corners.tolist()) == {0, 1, 2, 6, 7, 8, 12, 13, 14}
    assert bool((label - corners[:, None, None] == place[:, :4, :4]).all())
    assert bool((RandomCrop(size=4, p=0)(batch, seeded(0)).label[:, 0, 0] == 7).all())
    assert torch.equal(RandomCrop(size=6)(batch, seeded(0)).label, place)


def test_a_crop_larger_than_the_image_raises() -> None:
    with pytest.raises(RecipeError, match=r"random_crop\.size .*32"):
        RandomCrop(size=64)(encoded(0, height=32, width=48), seeded(0))


def test_coarse_dropout_fills_with_the_mean_and_ignores_labels() -> None:
    batch = encoded(3, count=40)
    holes = CoarseDropout(p=1, min_holes=1, max_holes=1, min_size=0.25, max_size=0.25)(batch, seeded(0))
    hidden = holes.label == IGNORE
    assert bool((hidden.sum((1, 2)) == 8 * 8).all())
    mean = batch.image.mean((2, 3), keepdim=True).expand_as(batch.image)
    inside = hidden[:, None].expand_as(mean)
    torch.testing.assert_close(holes.image[inside], mean[inside])
    assert torch.equal(holes.image[~inside], batch.image[~inside])
    assert torch.equal(holes.label[~hidden], batch.label[~hidden])
    many = CoarseDropout(p=1)(encoded(3, count=1000), seeded(0)).label == IGNORE
    for axis in (1, 2):
        assert bool(many.any(axis).any(0).all())  # a hole may be anywhere
    assert int(many.sum((1, 2)).max()) == 2 * 6 * 6  # two holes of a fifth of 32 pixels
    kept = CoarseDropout(p=1, fill="keep")(batch, seeded(0))
    assert torch.equal(kept.label, batch.label)
    assert not torch.equal(kept.image, batch.image)


def test_labels_of_any_id_stay_valid() -> None:
    label = torch.arange(256).view(1, 16, 16)
    grid = torch.stack(torch.meshgrid(torch.arange(16) + 0.5, torch.arange(16) + 0.5, indexing="xy"), -1)[None]
    assert torch.equal(warp(Labeled(label[:, None].float(), label), grid).label, label)
