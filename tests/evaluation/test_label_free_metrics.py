from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from overfly.adaptation.model_selection import DEFAULT_VALIDATORS, mean_ranks
from overfly.core.errors import NotFiniteError
from overfly.core.records import Logits
from overfly.evaluation.images import MetricOptions, center_crop, unlabeled_images
from overfly.evaluation.label_free_metrics import (
    VALIDATORS,
    LabelFreeMetrics,
    balanced_miou,
    label_free_metrics,
    neighborhood_density,
    nuclear_norm,
)
from overfly.evaluation.perturbations import Perturbation, mild_perturbations, random_mask, rotated
from overfly.evaluation.scores import Confusion
from planted import ByLevel, Constant, Patches


@pytest.fixture(scope="module")
def sharp() -> LabelFreeMetrics:
    return label_free_metrics(ByLevel(20), Patches())


@pytest.fixture(scope="module")
def collapsed() -> LabelFreeMetrics:
    return label_free_metrics(Constant(), Patches())


def test_metrics_of_a_perfect_confident_network(sharp: LabelFreeMetrics) -> None:
    assert sharp.entropy == pytest.approx(0, abs=1e-3)
    assert sharp.information > 0.9
    assert sharp.diversity > 0.9
    assert sharp.by_view["90°"] == 1
    assert sharp.masked is not None
    assert 0 < sharp.masked < 1
    assert sum(sharp.shares) == pytest.approx(1)
    assert sharp.images == 5
    assert (sharp.agreement, sharp.source_miou) == (None, None)


def test_metrics_of_a_collapsed_network(sharp: LabelFreeMetrics, collapsed: LabelFreeMetrics) -> None:
    assert collapsed.entropy == pytest.approx(0, abs=1e-6)
    assert collapsed.masked == collapsed.views == 1
    assert collapsed.snd == pytest.approx(1)
    assert collapsed.information == pytest.approx(0, abs=1e-6)
    assert collapsed.diversity == 0
    assert collapsed.nuclear_norm == pytest.approx(1 / math.sqrt(3))
    assert collapsed.masked_miou == collapsed.views_miou == pytest.approx(1 / 3)
    values = [sharp.by_validator(), collapsed.by_validator()]
    assert mean_ranks(values, DEFAULT_VALIDATORS) == [1, 0]
    assert mean_ranks(values, ["masked"]) == [0, 1]


def test_metrics_of_uniform_probabilities() -> None:
    found = label_free_metrics(Constant(0.0), Patches())
    assert found.entropy == pytest.approx(-1)
    assert found.information == pytest.approx(0, abs=1e-6)
    assert found.nuclear_norm == pytest.approx(1 / 3)


def test_exchanged_classes_change_agreement_only(sharp: LabelFreeMetrics) -> None:
    exchanged = label_free_metrics(ByLevel(20, (1, 2, 0)), Patches(), reference=ByLevel(20))
    assert exchanged.agreement == 0
    blind = set(VALIDATORS) - {"agreement", "source_miou"}
    for name in blind:
        assert getattr(exchanged, name) == pytest.approx(getattr(sharp, name), abs=1e-6), name
    assert label_free_metrics(ByLevel(1), Patches(), reference=ByLevel(20)).agreement == 1


def test_agreement_of_a_collapsed_network_with_itself_is_1(collapsed: LabelFreeMetrics) -> None:
    assert label_free_metrics(Constant(20.0), Patches(), reference=Constant(20.0)).agreement == 1
    assert collapsed.views_miou == pytest.approx(1 / 3)  # giving classes up still costs consistency


def test_lost_classes_lower_agreement() -> None:
    before = torch.tensor([[6, 0, 0], [2, 0, 0], [0, 0, 0]])  # neither predicts the third class
    assert Confusion(before).miou == pytest.approx((6 / 8 + 0) / 2)


def test_metrics_are_deterministic_and_change_no_state(sharp: LabelFreeMetrics) -> None:
    network = nn.Sequential(nn.Dropout(0.5))
    network.append(ByLevel(20))
    network[1].eval()
    before = torch.random.get_rng_state()
    assert label_free_metrics(network, Patches()) == sharp
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (network.training, network[0].training, network[1].training) == (True, True, False)
    assert label_free_metrics(ByLevel(20), Patches(), options=MetricOptions(seed=1)).masked != sharp.masked


def test_metrics_are_in_their_ranges(sharp: LabelFreeMetrics, collapsed: LabelFreeMetrics) -> None:
    for found in (
        sharp,
        collapsed,
        label_free_metrics(ByLevel(0.1), Patches(), options=MetricOptions(limit=2, crop=20, window=16)),
    ):
        for name, value in found.by_validator().items():
            assert value is None or (-1 if name == "entropy" else 0) - 1e-9 <= value <= 1 + 1e-9, name
    assert LabelFreeMetrics.model_validate_json(sharp.model_dump_json()) == sharp


def test_images_are_evenly_spaced_center_crops_without_labels() -> None:
    found = list(unlabeled_images(Patches(images=10), "train", MetricOptions(limit=3, crop=20)))
    assert [tuple(image.shape) for image in found] == [(3, 20, 20)] * 3
    again = list(unlabeled_images(Patches(images=10), "train", MetricOptions(limit=3, crop=20)))
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    assert center_crop(torch.arange(25).reshape(5, 5), 3).tolist() == [[6, 7, 8], [11, 12, 13], [16, 17, 18]]
    assert center_crop(torch.zeros(4, 9), 6).shape == (4, 6)
    assert next(unlabeled_images(Patches(), "train", MetricOptions(resize=16))).shape == (3, 16, 16)


@pytest.mark.parametrize("view", [random_mask(), *mild_perturbations()], ids=lambda view: view.name)
@pytest.mark.parametrize("size", [(24, 24), (16, 40)])
def test_perturbations_are_inverted_to_the_image_size(view: object, size: tuple[int, int]) -> None:
    assert isinstance(view, Perturbation)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 255
    perturbed = view.apply(image, 255.0, torch.Generator().manual_seed(0))
    assert perturbed.min() >= 0
    assert perturbed.max() <= 255 + 1e-3
    assert view.invert(perturbed, size).shape == image.shape
    if view.name.endswith("°"):
        assert torch.equal(view.invert(perturbed, size), image)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 3), st.booleans())
def test_rotations_are_inverted(quarters: int, mirrored: bool) -> None:
    image = torch.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    view = rotated(quarters, mirrored)
    assert torch.equal(view.invert(view.apply(image, 1.0, torch.Generator()), (3, 5)), image)


def test_nuclear_norm_bounds() -> None:
    confident = torch.eye(4).repeat(25, 1)
    assert nuclear_norm(confident) == pytest.approx(1)
    assert nuclear_norm(torch.eye(4)[:1].repeat(100, 1)) == pytest.approx(1 / 2)
    assert nuclear_norm(torch.full((100, 4), 0.25)) == pytest.approx(1 / 4)
    assert nuclear_norm(torch.eye(4)[:2]) == pytest.approx(1), "fewer rows than classes"


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 40), st.integers(2, 6), st.integers(0, 10**6))
def test_nuclear_norm_is_in_its_range(rows: int, classes: int, seed: int) -> None:
    scores = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 3
    assert 1 / classes - 1e-6 <= nuclear_norm(scores.softmax(1)) <= 1


def test_neighborhood_density_grows_with_tighter_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(4).repeat(20, 1) * 6
    noise = torch.randn(80, 4, generator=generator)
    found = [neighborhood_density((centers + width * noise).softmax(1)) for width in (0.0, 1.0, 2.0, 3.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(math.log(19) / math.log(79), abs=1e-2), "each has 19 like it"
    assert neighborhood_density(torch.eye(4)[:1].repeat(9, 1)) == pytest.approx(1)
    assert math.isnan(neighborhood_density(torch.ones(2, 2)))


def test_consistency_is_agreement_beyond_chance() -> None:
    two = Patches(levels=2)
    assert label_free_metrics(ByLevel(20), two).consistency == 1
    collapsed = label_free_metrics(Constant(), two)
    assert (collapsed.views, collapsed.consistency) == (1, 0)


def test_balanced_miou_counts_a_lost_class_as_zero() -> None:
    assert balanced_miou(Confusion(torch.diag(torch.tensor([5, 5, 5])))) == 1
    assert balanced_miou(Confusion(torch.diag(torch.tensor([9, 0, 6])))) == pytest.approx(2 / 3)


def test_scores_that_are_not_finite_raise() -> None:
    class Broken(nn.Module):
        def forward(self, image: Tensor) -> Logits:
            return Logits(torch.full((len(image), 3, *image.shape[-2:]), float("nan")))

    with pytest.raises(NotFiniteError):
        label_free_metrics(Broken(), Patches())
