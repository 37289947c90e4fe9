from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from overfly.adaptation.estimate import (
    Calibrator,
    ShiftError,
    calibrate,
    estimate,
    expected_confusion,
    expected_miou,
    interval,
)
from overfly.core.records import IGNORE
from overfly.evaluation.images import MetricOptions
from overfly.evaluation.perturbations import domain_shifts
from overfly.evaluation.scores import Confusion
from planted import ByLevel, Constant, Patches


def overconfident_scores(pixels: int = 20_000, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overconfident scores, ``scale`` times the calibrated ones, and labels drawn from the calibrated ones."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(3, pixels, generator=generator) * 2
    label = torch.multinomial(true.softmax(0).T, 1, generator=generator)[:, 0]
    return true * scale, label


def test_a_known_temperature_is_recovered() -> None:
    scores, label = overconfident_scores()
    result = calibrate(scores, label, torch.arange(len(label)) % 4)
    assert result.temperature == pytest.approx(3, rel=0.05)
    ignored = torch.cat([label, torch.full((5000,), IGNORE)])
    more = torch.cat([scores, torch.full((3, 5000), 100.0)], 1)
    assert calibrate(more, ignored).temperature == pytest.approx(calibrate(scores, label).temperature, rel=1e-6)


def test_class_biases_are_used_where_they_help() -> None:
    scores, label = overconfident_scores(scale=1.0)
    biased = scores + torch.tensor([2.0, 0.0, 0.0])[:, None]
    result = calibrate(biased, label, torch.arange(len(label)) % 4)
    assert result.bias.any()
    assert float(result.bias[1] - result.bias[0]) == pytest.approx(2, abs=0.15)
    assert not calibrate(biased, label).bias.any(), "without held-out images there are no class biases"


def test_calibrated_confidences_expect_the_truth() -> None:
    scores, label = overconfident_scores(scale=3.0)
    calibrator = calibrate(*overconfident_scores(scale=3.0, seed=1))
    truth = Confusion.from_predictions(scores.argmax(0), label, 3)
    expected = expected_confusion(calibrator(scores))
    assert float(expected.sum()) == pytest.approx(len(label))
    assert torch.allclose(expected, truth.counts.double(), rtol=0.1, atol=60)
    assert expected_miou(expected) == pytest.approx(truth.miou, abs=0.01)
    uncalibrated = expected_confusion(Calibrator(1.0, torch.zeros(3))(scores))
    assert expected_miou(uncalibrated) > truth.miou + 0.1


def test_a_class_that_is_not_there_is_left_out() -> None:
    counts = torch.tensor([[50.0, 0.0, 0.0], [0.0, 50.0, 0.0], [0.0, 0.0, 0.01]])
    assert expected_miou(counts) == 1


def errors_of(*wrong: float, at: float = 0.5) -> list[ShiftError]:
    return [ShiftError(name=str(error), estimate=at, truth=at - error) for error in wrong]


def test_the_interval_is_what_errors_make_it() -> None:
    assert interval(0.5, errors_of(0.1, 0.1, 0.1)) == pytest.approx((0.4, 0.4, 0.4))
    low, center_crop, high = interval(0.5, errors_of(0.0, 0.1, 0.2))
    assert 0.3 <= low < center_crop < high <= 0.5
    assert center_crop == pytest.approx(0.4)
    wider = interval(0.5, errors_of(0.0, 0.1, 0.2), deviation=0.05)
    assert wider[0] < low
    assert wider[2] > high
    assert interval(0.05, errors_of(0.2, 0.3))[0] == 0


def test_errors_of_shifts_that_are_as_hard_count_most() -> None:
    easy, hard = errors_of(0.0, 0.0, 0.0, at=0.9), errors_of(0.3, 0.3, 0.3, at=0.4)
    assert interval(0.4, [*easy, *hard])[1] < 0.25
    assert interval(0.9, [*easy, *hard])[1] > 0.8


def test_the_estimate_of_a_network_holds_the_truth_and_opens_no_target_label() -> None:
    network, target = ByLevel(0.15), Patches(first=50)
    result = estimate(network, Patches(blind=False), target, MetricOptions(limit=4))
    seeing = Patches(first=50, blind=False)
    truth = Confusion(torch.zeros(3, 3, dtype=torch.int64))
    for item in seeing.items("train"):
        image = torch.from_numpy(seeing.read_image(item)).permute(2, 0, 1)[None].float()
        truth = truth + Confusion.from_predictions(
            network(image).main.argmax(1)[0], torch.from_numpy(seeing.read_label(item)), 3
        )
    assert result.low <= truth.miou <= result.high
    assert (result.source_labels, result.images) == (4, 4)
    assert result.temperature < 1, "the planted network is always right and claims less"
    assert result.shifts[0].name == "none"
    assert result.shifts[0].truth == 1
    assert estimate(network, Patches(blind=False), target, MetricOptions(limit=4)) == result


def test_a_collapsed_network_is_estimated_low() -> None:
    result = estimate(Constant(), Patches(blind=False), Patches(first=50), MetricOptions(limit=3))
    assert result.high < 0.35


def test_shifts_are_finite_and_keep_their_range() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 24, 24))).float()
    family = domain_shifts([image.flip(0)[:, :16], image * 0.2])
    assert len({shift.name for shift in family}) == len(family) > 15
    for shift in family:
        perturbed = shift.apply(image, 255.0, torch.Generator().manual_seed(0))
        assert perturbed.isfinite().all(), shift.name
        assert perturbed.min() >= -1e-3, shift.name
        assert perturbed.max() <= 255 + 1e-3, shift.name
        assert shift.invert(perturbed, (24, 24)).shape == image.shape
    assert torch.equal(family[0].apply(image, 255.0, torch.Generator()), image)
