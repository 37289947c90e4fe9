from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from overfly.core.records import IGNORE
from overfly.ops.losses import (
    boundary_loss,
    charbonnier_entropy,
    cross_entropy,
    dice_loss,
    distance_to_uniform,
    diversity,
    entropy,
    mean_entropy,
    ohem_cross_entropy,
    soft_label_loss,
)

K = 4


def scene(
    seed: int, *, batch: int = 2, size: int = 6, ignored: float = 0.3, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Scores and a label, a part of it ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(batch, K, size, size, generator=generator)
    label = torch.randint(0, K, (batch, size, size), generator=generator)
    label[torch.rand(label.shape, generator=generator) < ignored] = IGNORE
    return logits.requires_grad_(), label


def slow_ohem(logits: Tensor, label: Tensor, threshold: float, min_kept: int) -> float:
    """The published definition, pixel by pixel in numpy."""
    scores: NDArray[np.float64] = logits.detach().double().numpy()
    exponents = np.exp(scores - scores.max(1, keepdims=True))
    probability = exponents / exponents.sum(1, keepdims=True)
    true = [
        probability[b, label[b, y, x], y, x]
        for b in range(label.shape[0])
        for y in range(label.shape[1])
        for x in range(label.shape[2])
        if label[b, y, x] != IGNORE
    ]
    if not true:
        return 0.0
    limit = max(sorted(true)[min(min_kept, len(true) - 1)], threshold)
    kept = [-math.log(p) for p in true if p < limit]
    return float(np.mean(kept)) if kept else 0.0


@given(seed=st.integers(0, 1000), ignored=st.sampled_from([0.0, 0.3, 0.9]))
@settings(deadline=None, max_examples=15)
def test_cross_entropy_is_that_of_torch_without_ignored_pixels(seed: int, ignored: float) -> None:
    logits, label = scene(seed, ignored=ignored)
    label[0, 0, 0] = 1
    classes = torch.tensor([0.1, 2.0, 1.0, 0.5])
    torch.testing.assert_close(cross_entropy(logits, label), F.cross_entropy(logits, label, ignore_index=IGNORE))
    torch.testing.assert_close(
        cross_entropy(logits, label, class_weight=classes), F.cross_entropy(logits, label, classes, ignore_index=IGNORE)
    )


def test_pixel_weights_scale_the_sum_only() -> None:
    logits, label = scene(0)
    whole = cross_entropy(logits, label)
    torch.testing.assert_close(cross_entropy(logits, label, weight=torch.full((2, 1, 1), 0.5)), whole / 2)
    images = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    per_pixel = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    expected = per_pixel[0].sum() / (label != IGNORE).sum()
    torch.testing.assert_close(cross_entropy(logits, label, weight=images), expected)


def test_cross_entropy_rejects_other_sizes() -> None:
    logits, label = scene(0)
    with pytest.raises(ValueError, match=r"\(2, 4, 6, 6\).*\(2, 5, 6\)"):
        cross_entropy(logits, label[:, 1:])


@given(
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    min_kept=st.sampled_from([1, 5, 40, 1000]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=60)
def test_ohem_is_the_published_definition(seed: int, threshold: float, min_kept: int, ignored: float) -> None:
    logits, label = scene(seed, ignored=ignored)
    loss = ohem_cross_entropy(logits, label, threshold, min_kept)
    assert loss.item() == pytest.approx(slow_ohem(logits, label, threshold, min_kept), rel=1e-4, abs=1e-6)


def at_probabilities(values: list[float]) -> tuple[Tensor, Tensor]:
    """One row of pixels whose true class, 0 of 2, has the given probabilities."""
    true = torch.tensor(values, dtype=torch.float64)
    return torch.stack((true.log(), (1 - true).log()))[None, :, None], torch.zeros(1, 1, len(values), dtype=torch.int64)


@pytest.mark.parametrize(
    ("values", "threshold", "min_kept", "kept"),
    [
        ([0.1, 0.5, 0.6, 0.95], 0.9, 1, [0.1, 0.5, 0.6]),  # the threshold keeps more than min_kept
        ([0.1, 0.5, 0.6, 0.95], 0.2, 2, [0.1, 0.5]),  # min_kept keeps more than the threshold
        ([0.1, 0.95, 0.96, 0.97], 0.9, 2, [0.1, 0.95]),
        ([0.95, 0.96, 0.97], 0.9, 100, [0.95, 0.96]),  # fewer valid than min_kept: the most confident one is dropped
        ([0.5, 0.6, 0.7], 0.9, 100, [0.5, 0.6, 0.7]),
        ([0.1, 0.5, 0.5, 0.5, 0.7], 0.2, 2, [0.1]),  # none of those that tie at the limit
        ([0.95, 0.95, 0.95], 0.9, 1, []),  # all tie: nothing is kept
        ([0.95], 0.9, 100, []),
        ([0.5], 0.9, 100, [0.5]),
    ],
)
def test_ohem_keeps_hard_pixels(values: list[float], threshold: float, min_kept: int, kept: list[float]) -> None:
    logits, label = at_probabilities(values)
    expected = -sum(math.log(p) for p in kept) / max(1, len(kept))
    assert ohem_cross_entropy(logits, label, threshold, min_kept).item() == pytest.approx(expected)


def test_ohem_weights_do_not_change_the_selected_pixels() -> None:
    logits, label = scene(3)
    plain = ohem_cross_entropy(logits, label, 0.5, 10)
    torch.testing.assert_close(ohem_cross_entropy(logits, label, 0.5, 10, weight=torch.tensor(0.5)), plain / 2)
    classes = torch.full((K,), 3.0)
    torch.testing.assert_close(ohem_cross_entropy(logits, label, 0.5, 10, class_weight=classes), 3 * plain)


def test_loss_without_valid_pixels_is_zero_and_differentiable() -> None:
    for loss in (cross_entropy, ohem_cross_entropy, dice_loss):
        logits, label = scene(1, ignored=1.0)
        value = loss(logits, label)
        torch.autograd.backward(value)
        assert value.item() == 0, loss.__name__
        assert logits.grad is not None
        assert not logits.grad.any(), loss.__name__
    scores = torch.randn(2, 1, 4, 4, requires_grad=True)
    value = boundary_loss(scores, torch.ones(2, 4, 4, dtype=torch.bool), valid=torch.zeros(2, 4, 4, dtype=torch.bool))
    torch.autograd.backward(value)
    assert value.item() == 0
    assert scores.grad is not None
    assert not scores.grad.any()


def test_nan_scores_give_nan_losses() -> None:
    logits, label = scene(2, ignored=0)
    with torch.no_grad():
        logits[0, :, 2, 2] = torch.nan
    for loss in (cross_entropy, ohem_cross_entropy, dice_loss):
        assert loss(logits, label).isnan(), loss.__name__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scores_are_reduced_in_full_precision(dtype: torch.dtype) -> None:
    logits, label = scene(4, size=32)
    half = logits.detach().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = {each: each(half, label) for each in (cross_entropy, ohem_cross_entropy, dice_loss)}
        edge = boundary_loss(half[:, :1], label == 0)
        maximum = mean_entropy(half)
    for each, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, each(half.float(), label), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(edge, boundary_loss(half[:, :1].float(), label == 0))
    torch.testing.assert_close(maximum, mean_entropy(half.float()))


def test_boundary_loss_by_hand() -> None:
    scores = torch.tensor([2.0, -1.0, 0.5, 0.0]).view(1, 1, 2, 2)
    edges = torch.tensor([True, False, False, False]).view(1, 2, 2)
    cost = [math.log1p(math.exp(-2.0)), *(math.log1p(math.exp(s)) for s in (-1.0, 0.5, 0.0))]
    expected = 20 * (0.75 * cost[0] + 0.25 * sum(cost[1:])) / 4
    assert boundary_loss(scores, edges).item() == pytest.approx(expected)
    torch.testing.assert_close(boundary_loss(scores, edges.unsqueeze(1)), boundary_loss(scores, edges))
    without_last = torch.tensor([True, True, True, False]).view(1, 2, 2)
    expected = 20 * (2 / 3 * cost[0] + 1 / 3 * sum(cost[1:3])) / 3
    assert boundary_loss(scores, edges, valid=without_last).item() == pytest.approx(expected)
    half = boundary_loss(scores, edges, weight=10, pixel_weight=torch.full((1, 1, 1), 0.5))
    torch.testing.assert_close(half, boundary_loss(scores, edges) / 4)


def test_boundary_loss_is_balanced_and_rejects_masks_that_are_not_bool() -> None:
    scores = torch.zeros(1, 1, 2, 2, requires_grad=True)
    edges = torch.tensor([255, 0, 0, 0], dtype=torch.uint8).view(1, 2, 2)
    with pytest.raises(ValueError, match="uint8"):
        boundary_loss(scores, edges)
    torch.autograd.backward(boundary_loss(scores, edges > 0))
    assert scores.grad is not None
    pull = scores.grad.flatten()
    assert pull[0] < 0 < pull[1]
    assert pull.sum().item() == pytest.approx(0, abs=1e-6)  # balanced


def test_boundary_loss_rejects_other_sizes() -> None:
    for scores, edges in (((1, 1, 2, 2), (1, 4, 4)), ((1, 2, 2, 2), (1, 2, 2))):
        with pytest.raises(ValueError, match="boundary"):
            boundary_loss(torch.zeros(scores), torch.zeros(edges, dtype=torch.bool))


def test_dice_by_hand() -> None:
    logits, label = at_probabilities([0.8, 0.6, 0.3])
    label[0, 0, 2] = 1
    first, second = 2 * 1.4 / (1.7 + 2), 2 * 0.7 / (1.3 + 1)
    assert dice_loss(logits, label).item() == pytest.approx(1 - (first + second) / 2)
    label[0, 0, 2] = IGNORE
    assert dice_loss(logits, label).item() == pytest.approx(1 - 2 * 1.4 / (1.4 + 2))  # absent classes do not count
    half = torch.full((1, 1, 1), 0.5)
    torch.testing.assert_close(dice_loss(logits, label, weight=half), dice_loss(logits, label) / 2)


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_dice_falls_to_zero_when_right(seed: int) -> None:
    _, label = scene(seed, ignored=0.2)
    right = 50.0 * F.one_hot(label.masked_fill(label == IGNORE, 0), K).permute(0, 3, 1, 2)
    assert dice_loss(right, label).item() == pytest.approx(0, abs=1e-5)
    assert 0.5 < dice_loss(-right, label).item() <= 1


def test_entropy_is_0_to_1() -> None:
    logits = torch.stack((torch.zeros(K), torch.tensor([100.0, 0, 0, 0])), 1).view(1, K, 1, 2)
    torch.testing.assert_close(entropy(logits), torch.tensor([[[1.0, 0.0]]]))
    assert mean_entropy(logits).item() == pytest.approx(0.5)
    assert mean_entropy(logits, torch.tensor([[[True, False]]])).item() == pytest.approx(1)
    assert mean_entropy(logits, torch.tensor([[[False, False]]])).item() == 0
    with pytest.raises(ValueError, match="2 classes"):
        entropy(logits[:, :1])


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


def test_soft_label_loss_is_zero_for_equal_scores() -> None:
    logits = torch.randn(2, 5, 4, 4)
    assert soft_label_loss(logits, logits, 2.0).abs() < 1e-6
    assert soft_label_loss(logits, logits + 3.0, 2.0).abs() < 1e-5  # a constant changes no probability


def test_soft_labels_are_the_divergence_from_the_teacher() -> None:
    student, teacher = torch.randn(2, 5, 4, 4).requires_grad_(), torch.randn(2, 5, 4, 4).requires_grad_()
    result = soft_label_loss(student, teacher, 3.0)
    expected = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="none").sum(1).mean() * 9
    assert torch.allclose(result, expected)
    result.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert teacher.grad is None
