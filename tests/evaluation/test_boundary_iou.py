from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from overfly.core.records import IGNORE
from overfly.evaluation.scores import boundary_counts, boundary_iou


def _square(shift: int = 0, side: int = 32) -> Tensor:
    label = torch.zeros(side, side, dtype=torch.int64)
    label[8:24, 8 + shift : 24 + shift] = 1
    return label


def _eroded(mask: NDArray[np.bool_], times: int) -> NDArray[np.bool_]:
    """Erosion by 3 × 3 with a border of ones."""
    for _ in range(times):
        padded = np.pad(mask, 1, constant_values=True)
        mask = np.all(
            [padded[y : y + mask.shape[0], x : x + mask.shape[1]] for y in range(3) for x in range(3)], axis=0
        )
    return mask


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 4))
def test_agrees_with_the_definition_by_erosion(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 3, (2, 4, 5), generator=generator)
    label, prediction = (ids.repeat_interleave(6, 0).repeat_interleave(6, 1) for ids in coarse)
    counts = boundary_counts(prediction, label, 3, width)
    for index in range(3):
        truth, guess = (label == index).numpy(), (prediction == index).numpy()
        outline, guessed = truth & ~_eroded(truth, width), guess & ~_eroded(guess, width)
        assert counts[:, index].tolist() == [outline.sum(), guessed.sum(), (outline & guessed).sum()]


def test_a_perfect_prediction_scores_one_and_a_shifted_one_less() -> None:
    label = _square()
    assert boundary_iou(boundary_counts(label, label, 2, width=2)).tolist() == [1.0, 1.0]
    near, far = (float(boundary_iou(boundary_counts(_square(shift), label, 2, width=2)).nanmean()) for shift in (1, 4))
    assert 0 < far < near < 1


def test_a_shift_lowers_boundary_iou_more_than_iou() -> None:
    label, shifted = _square(), _square(2)
    plain = float(((label == 1) & (shifted == 1)).sum() / ((label == 1) | (shifted == 1)).sum())
    assert float(boundary_iou(boundary_counts(shifted, label, 2, width=2))[1]) < plain - 0.2


def test_borders_of_images_and_ignored_areas_are_not_boundaries() -> None:
    whole = torch.ones(16, 16, dtype=torch.int64)
    assert math.isnan(float(boundary_iou(boundary_counts(whole, whole, 2, width=3)).nanmean()))
    label = whole.clone()
    label[:, 8:] = IGNORE
    prediction = whole.clone()
    prediction[:, 8:] = 0
    assert boundary_counts(prediction, label, 2, width=3).sum() == 0


def test_sums_over_images_and_ranks() -> None:
    labels = torch.stack([_square(), _square(3), _square(-3)])
    predictions = torch.stack([_square(1), _square(3), _square()])
    summed = torch.zeros(3, 2, dtype=torch.int64)
    for prediction, label in zip(predictions, labels, strict=True):
        summed += boundary_counts(prediction, label, 2, width=2)
    torch.testing.assert_close(summed, boundary_counts(predictions, labels, 2, width=2))
