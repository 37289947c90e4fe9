from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binned_statistic
from torch import Tensor, distributed

from overfly.core.records import IGNORE
from overfly.evaluation.scores import Protocol, SplitCounts, calibration_counts, reliability


def _scores(seed: int, images: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(images, 4, 9, 7, generator=generator) * 2
    label = torch.randint(0, 4, (images, 9, 7), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.3] = IGNORE
    return scores, label


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), bins=st.sampled_from([5, 15, 20]))
def test_calibration_error_agrees_with_binned_sums_of_scipy(seed: int, bins: int) -> None:
    scores, label = _scores(seed)
    known = label != IGNORE
    confidence, prediction = (values[known] for values in scores.double().softmax(1).max(1))
    difference = (confidence - (prediction == label[known]).double()).numpy()
    sums = binned_statistic(confidence.numpy(), difference, "sum", bins, range=(0, 1)).statistic
    ece = abs(sums).sum() / len(difference)
    assert reliability(calibration_counts(scores, label, bins)).ece == pytest.approx(ece, abs=1e-5)


def test_sums_over_images() -> None:
    scores, label = _scores(0)
    whole = calibration_counts(scores, label)
    summed = torch.zeros_like(whole)
    for one, truth in zip(scores, label, strict=True):
        summed += calibration_counts(one, truth)
    torch.testing.assert_close(summed, whole)
    assert int(whole[0].sum()) == int((label != IGNORE).sum())


def _counts(index: slice) -> SplitCounts:
    counts = SplitCounts.empty(4, Protocol())
    for scores, label in zip(*(values[index] for values in _scores(0)), strict=True):
        counts = counts.plus(SplitCounts.from_predictions(scores, scores.argmax(0), label, Protocol()))
    return counts


def test_split_counts_add_up_over_two_ranks_of_gloo() -> None:
    """Two real ranks, each in a thread of its own."""
    c10d: Any = distributed  # its classes carry no types
    store = c10d.HashStore()

    def rank(index: int) -> SplitCounts:
        group = c10d.ProcessGroupGloo(store, index, 2, timedelta(seconds=30))

        def add(counts: Tensor) -> Tensor:
            total = counts.clone()
            group.allreduce([total]).wait()
            return total

        return _counts(slice(index, None, 2)).reduce(add)

    whole = _counts(slice(None))
    with ThreadPoolExecutor(2) as pool:
        for summed in pool.map(rank, range(2)):
            torch.testing.assert_close(summed, whole)
            assert int(summed.images) == 3


def test_overconfidence_of_wrong_confident_predictions() -> None:
    label = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 0]])
    confident = torch.stack([torch.full((1, 10), 20.0), torch.zeros(1, 10)])
    overconfident = reliability(calibration_counts(confident, label))
    assert overconfident.ece == pytest.approx(0.4, abs=1e-6)
    assert overconfident.overconfidence == pytest.approx(0.4, abs=1e-6)
    assert overconfident.pixels[-1] == 10
    calibrated = torch.stack([torch.full((1, 10), math.log(0.6)), torch.full((1, 10), math.log(0.4))])
    assert reliability(calibration_counts(calibrated, label)).ece == pytest.approx(0, abs=1e-6)


def test_empty_calibration_has_no_error() -> None:
    empty = reliability(torch.zeros(3, 15))
    assert empty.ece is empty.overconfidence is None
