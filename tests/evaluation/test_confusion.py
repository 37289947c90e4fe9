from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import Tensor

from overfly.core.records import IGNORE
from overfly.evaluation.scores import Confusion

K = 5
NOTHING = torch.zeros(K, K, dtype=torch.int64)


def _pixels(seed: int, number: int = 400, classes: int = K) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (number,), generator=generator)
    prediction = torch.where(
        torch.rand(number, generator=generator) < 0.6,
        label,
        torch.randint(0, classes, (number,), generator=generator),
    )
    label[torch.rand(number, generator=generator) < 0.2] = IGNORE
    return prediction, label


def test_rows_are_labels_and_columns_predictions() -> None:
    confusion = Confusion.from_predictions(torch.tensor([[1, 1], [0, 2]]), torch.tensor([[0, 1], [IGNORE, 2]]), 3)
    assert confusion.counts.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert confusion.pixels == 3


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), batches=st.integers(1, 4))
def test_agrees_with_scikit_learn_over_several_batches(seed: int, batches: int) -> None:
    pixels = [_pixels(seed + batch) for batch in range(batches)]
    total = sum((Confusion.from_predictions(*batch, K) for batch in pixels), Confusion(NOTHING))
    prediction, label = (torch.cat(parts) for parts in zip(*pixels, strict=True))
    known = label != IGNORE
    pair = label[known].numpy(), prediction[known].numpy()
    each = {"labels": range(K), "average": None}
    expected = {
        "iou": metrics.jaccard_score(*pair, **each),
        "miou": metrics.jaccard_score(*pair, average="macro"),
        "f1": metrics.f1_score(*pair, **each),
        "precision": metrics.precision_score(*pair, **each),
        "recall": metrics.recall_score(*pair, **each),
        "accuracy": metrics.accuracy_score(*pair),
        "kappa": metrics.cohen_kappa_score(*pair),
    }
    for name, value in expected.items():
        assert torch.as_tensor(getattr(total, name)).numpy() == pytest.approx(value, abs=1e-9), name


def test_agrees_with_scikit_learn_where_a_class_is_absent() -> None:
    prediction, label = _pixels(3, classes=3)
    known = label != IGNORE
    confusion = Confusion.from_predictions(prediction, label, K)
    assert confusion.miou == pytest.approx(metrics.jaccard_score(label[known], prediction[known], average="macro"))
    assert confusion.iou[3:].isnan().all()


def test_absent_classes_are_left_out_and_only_predicted_ones_score_zero() -> None:
    label = torch.tensor([0, 0, 1, 1])
    assert Confusion.from_predictions(torch.tensor([0, 0, 1, 1]), label, 4).miou == 1.0
    extra_class = Confusion.from_predictions(torch.tensor([0, 0, 1, 2]), label, 4)
    assert extra_class.iou[:3].tolist() == [1.0, 0.5, 0.0]
    assert math.isnan(float(extra_class.iou[3]))
    assert extra_class.miou == pytest.approx(0.5)
    assert float(extra_class.recall.nanmean()) == pytest.approx(0.75)
    assert math.isnan(float(extra_class.recall[2]))


def test_one_matrix_is_not_the_mean_of_batches() -> None:
    """A mean of per-batch IoUs differs from the IoU of the split."""
    first = Confusion.from_predictions(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 1]), 2)
    second = Confusion.from_predictions(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 1, 1]), 2)
    assert (first + second).miou == pytest.approx((4 / 7 + 1 / 4) / 2)
    assert (first.miou + second.miou) / 2 != pytest.approx((first + second).miou, abs=0.1)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 400), max_size=4))
def test_adds_up_over_any_split_of_the_pixels(seed: int, cuts: list[int]) -> None:
    prediction, label = _pixels(seed)
    edges = [0, *sorted(cuts), 400]
    total = Confusion(NOTHING)
    for start, end in pairwise(edges):
        total = total + Confusion.from_predictions(prediction[start:end], label[start:end], K)
    assert torch.equal(total.counts, Confusion.from_predictions(prediction, label, K).counts)
    assert total.pixels > 0
    assert total.counts.dtype == torch.int64


def test_empty_confusion_has_no_scores() -> None:
    empty = Confusion.from_predictions(torch.zeros(4, dtype=torch.int64), torch.full((4,), IGNORE), K)
    assert torch.equal(empty.counts, NOTHING)
    assert all(math.isnan(value) for value in (empty.miou, empty.accuracy, float(empty.f1.nanmean()), empty.kappa))


def test_ids_out_of_range_raise() -> None:
    with pytest.raises(ValueError, match=r"label .*7"):
        Confusion.from_predictions(torch.tensor([0, 1]), torch.tensor([0, 7]), K)
    with pytest.raises(ValueError, match=r"prediction .*-1"):
        Confusion.from_predictions(torch.tensor([-1, 1]), torch.tensor([0, 1]), K)
    with pytest.raises(ValueError, match="differ in shape"):
        Confusion.from_predictions(torch.zeros(2, 2), torch.zeros(4), K)


def test_predictions_under_ignored_labels_are_not_checked() -> None:
    confusion = Confusion.from_predictions(torch.tensor([200, 1]), torch.tensor([IGNORE, 1]), 2)
    assert confusion.counts.tolist() == [[0, 0], [0, 1]]


def test_counts_above_32_bits() -> None:
    large = Confusion(torch.full((2, 2), 2**40, dtype=torch.int64))
    assert (large + large).pixels == 4 * 2**41
    assert (large + large).miou == pytest.approx(1 / 3)
