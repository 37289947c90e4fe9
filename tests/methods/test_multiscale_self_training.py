from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overfly.core.records import IGNORE, Batch, Labeled, Logits
from overfly.methods.multiscale_self_training import MultiscaleNetworks, MultiscaleSelfTraining
from overfly.ops.normalization import batch_norms, frozen_statistics
from overfly.ops.pseudo_labels import align_distribution, predict_augmented
from overfly.recipe import Recipe
from overfly.training.setup import initial_network


class Bright(nn.Module):
    """Class 1 where the first band is above a half."""

    def forward(self, image: Tensor) -> Logits:
        score = (image[:, :1] - 0.5) * 20
        return Logits(torch.cat([-score, score], 1))


@pytest.fixture
def nets(recipe: Recipe) -> MultiscaleNetworks:
    return MultiscaleSelfTraining().networks(initial_network(recipe)[0]).train()


@pytest.fixture
def batch() -> Batch:
    label = torch.randint(0, 7, (2, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    label[:, :8] = IGNORE
    return Batch(Labeled(torch.rand(2, 3, 64, 64) * 255, label), torch.rand(2, 3, 64, 64) * 255)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 2.0])
def test_predict_augmented_maps_predictions_back_to_the_input(scale: float) -> None:
    image = torch.zeros(1, 1, 32, 32)
    image[..., 4:20, 6:14] = 1
    for seed in range(8):
        torch.manual_seed(seed)
        result = predict_augmented(Bright(), image, scale)
        assert result.shape == (1, 2, 32, 32)
        wrong = (result.argmax(1) != image[:, 0].long()).float().mean()
        assert wrong <= (0 if scale >= 1 else 0.02)


def test_align_distribution_lowers_classes_that_are_predicted_too_often() -> None:
    probability = torch.tensor([0.55, 0.45]).view(1, 2, 1, 1)
    shares, even = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])
    assert torch.equal(align_distribution(probability, shares, even, 0.0), probability)
    assert torch.allclose(align_distribution(probability, shares, shares, 1.0), probability)
    assert align_distribution(probability, shares, even, 0.5).argmax(1).item() == 1
    assert align_distribution(shares.view(1, 2, 1, 1), shares, even, 1.0).flatten().tolist() == pytest.approx([0.5] * 2)


def test_shares_are_aligned_with_those_of_the_source(nets: MultiscaleNetworks, batch: Batch) -> None:
    """A rare class that is predicted as often as the source shows it does not grow."""
    label = torch.zeros_like(batch.source.label)
    label[:, :, : label.shape[2] // 4] = 1
    batch = batch._replace(source=batch.source._replace(label=label))
    method = MultiscaleSelfTraining(reference="source")
    nets = method.networks(nets.student)
    method.losses(nets, batch)
    assert nets.reference[:2].tolist() == pytest.approx([0.75, 0.25])
    method.losses(nets, batch._replace(source=batch.source._replace(label=torch.zeros_like(label))))
    assert nets.reference[:2].tolist() == pytest.approx([0.7625, 0.2375])


def test_frozen_statistics_do_not_change_in_training(nets: MultiscaleNetworks, batch: Batch) -> None:
    norms = batch_norms(nets.student)
    before = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
    method = MultiscaleSelfTraining(statistics="frozen")
    losses = method.losses(nets, batch)
    torch.autograd.backward(torch.stack(list(losses.values())).sum())
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))  # type: ignore[arg-type]
    assert all(norm.training for norm in norms)
    assert all(parameter.grad is not None for parameter in nets.student.parameters())
    MultiscaleSelfTraining().losses(nets, batch)
    assert not all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))  # type: ignore[arg-type]


def test_frozen_statistics_restores_modes() -> None:
    norm = nn.BatchNorm2d(2)
    modes = []
    for active in (True, False):
        with frozen_statistics(norm, active=active):
            modes.append(norm.training)
        modes.append(norm.training)
    assert modes == [False, True, True, True]


def test_the_most_confident_share_of_every_class_is_kept(nets: MultiscaleNetworks) -> None:
    target = torch.rand(2, 3, 64, 64)
    nets.teacher = Bright()
    nets.class_prior = nets.reference = torch.full((2,), 0.5)
    nets.thresholds = torch.zeros(2)
    method = MultiscaleSelfTraining(initial_share=0.5, share=0.5, scales=(1.0,), class_prior_power=0.0)
    torch.manual_seed(3)
    label = method.pseudo_labels(nets, target)
    torch.manual_seed(3)
    everything = predict_augmented(nets.teacher, target, 1.0).argmax(1)
    for index in (0, 1):
        share_kept = (label == index).sum() / (everything == index).sum()
        assert float(share_kept) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(label[label != IGNORE], everything[label != IGNORE])


def test_the_share_grows_linearly_over_ramp_steps(nets: MultiscaleNetworks) -> None:
    target = torch.rand(2, 3, 64, 64)
    nets.teacher = Bright()
    nets.class_prior = nets.reference = torch.full((2,), 0.5)
    method = MultiscaleSelfTraining(initial_share=0.2, share=0.8, ramp_steps=100, scales=(1.0,), class_prior_power=0.0)
    for step, share in ((0, 0.2), (50, 0.5), (100, 0.8), (1000, 0.8)):
        nets.step = step
        nets.thresholds = torch.zeros(2)
        share_kept = (method.pseudo_labels(nets, target) != IGNORE).float().mean()
        assert float(share_kept) == pytest.approx(share, abs=0.05)


def test_after_step_counts_steps(nets: MultiscaleNetworks) -> None:
    MultiscaleSelfTraining().after_step(nets, 0)
    MultiscaleSelfTraining().after_step(nets, 1)
    assert nets.step == 2


def test_ignored_source_pixels_are_never_pasted(
    nets: MultiscaleNetworks, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    losses: Any = MultiscaleSelfTraining.supervised

    def watched(self: MultiscaleSelfTraining, logits: Logits, label: Tensor, **named: Tensor) -> Any:
        if "where" in named:
            seen.extend((label, named["where"]))
        return losses(self, logits, label, **named)

    monkeypatch.setattr(MultiscaleSelfTraining, "supervised", watched)
    MultiscaleSelfTraining().losses(nets, batch)
    label, cut = seen
    assert not cut[:, :8].any()
    assert torch.equal(label[cut], batch.source.label[cut])


def test_a_target_without_confident_pixels_has_no_loss(nets: MultiscaleNetworks, batch: Batch) -> None:
    nets.thresholds.fill_(2.0)
    losses = MultiscaleSelfTraining(mix_share=0.0, initial_share=0.0).losses(nets, batch)
    assert float(losses["mixed_main"].detach()) == 0
    assert float(losses["source_main"].detach()) > 0


def test_the_teacher_is_deployed_and_averages_statistics(nets: MultiscaleNetworks) -> None:
    method = MultiscaleSelfTraining(ema=0.5)
    assert method.inference_network(nets) is nets.teacher
    norm, teacher_norm = batch_norms(nets.student)[0], batch_norms(nets.teacher)[0]
    assert norm.running_mean is not None
    norm.running_mean.add_(1.0)
    method.after_step(nets, 10)
    assert torch.allclose(teacher_norm.running_mean, norm.running_mean - 0.5)  # type: ignore[arg-type]


class Views(nn.Module):
    """Records its images."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []

    def forward(self, image: Tensor) -> Logits:
        self.images.append(image)
        return Logits(torch.cat([image, -image], 1)[:, :2])


@pytest.mark.parametrize("turns", [False, True])
def test_images_with_a_fixed_top_are_never_turned(nets: MultiscaleNetworks, batch: Batch, turns: bool) -> None:
    target = torch.zeros(2, 3, 64, 64)
    target[:, :, 0] = 1.0
    views, augmented = Views(), []
    for seed in range(12):
        torch.manual_seed(seed)
        predict_augmented(views, target, 1.0, turns=turns)
        method = MultiscaleSelfTraining(turns=turns)
        augmented.append(method.augment_target(nets, batch._replace(target=target, nodata_mask=None))[0])
    for images in (views.images, augmented):
        tops = [bool((image[:, :, 0] == 1).all()) for image in images]
        assert all(tops) == (not turns)


@pytest.mark.parametrize(("count", "sides"), [(None, [32, 64, 96] * 2), (1, [32, 64]), (2, [32, 64, 96, 32])])
def test_scales_are_taken_in_turn(nets: MultiscaleNetworks, batch: Batch, count: int | None, sides: list[int]) -> None:
    method = MultiscaleSelfTraining(scales=(0.5, 1.0, 1.5), scales_per_step=count)
    seen: list[int] = []
    nets.teacher.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-1]))
    for step in range(2):
        method.losses(nets, batch)
        method.after_step(nets, step)
    assert seen == sides
