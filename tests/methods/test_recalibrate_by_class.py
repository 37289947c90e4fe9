"""Statistics of a target whose class shares differ from the source's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from overfly.core.classes import Classes
from overfly.core.records import Batch, Labeled, Logits
from overfly.methods.recalibrate import COUNTING_STEPS, Recalibrate, RecalibrateByClass, RecalibrateNetworks
from overfly.models.network import Network
from overfly.models.segmenter import Segmenter
from overfly.ops.normalization import batch_norms, estimate_statistics

SOURCE, TARGET = (0.7, 0.2, 0.1), (0.1, 0.2, 0.7)
"""Shares of the classes; the images of a class are the same in both domains."""
LEVELS = torch.tensor([40.0, 120.0, 200.0])
STEPS = COUNTING_STEPS + 5


class Brightness(Network):
    """Classifies pixels by brightness; one normalization at full size, and one at half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.coarse = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, image: Tensor) -> Logits:
        self.coarse(nn.functional.avg_pool2d(self.norm(image), 2))
        return Logits(-(image.mean(1, keepdim=True) - LEVELS[:, None, None]).square())


def labeled(shares: tuple[float, ...], step: int) -> Labeled:
    """Images of 2 pixels wide patches of classes drawn by their shares, and their labels."""
    generator = torch.Generator().manual_seed(step)
    label = torch.multinomial(torch.tensor(shares), 4 * 16 * 16, replacement=True, generator=generator)
    label = label.view(4, 16, 16).repeat_interleave(2, 1).repeat_interleave(2, 2)
    noise = torch.randn(4, 3, 32, 32, generator=generator) * 5
    return Labeled(LEVELS[label][:, None] + noise, label)


def batch(step: int, nodata_mask: Tensor | None = None) -> Batch:
    target = labeled(TARGET, 100 + step).image
    if nodata_mask is not None:
        target = target.masked_fill(nodata_mask[:, None], 0.0)
    return Batch(labeled(SOURCE, step), target, nodata_mask)


@pytest.fixture(scope="module")
def start() -> Segmenter:
    """A network with statistics of the source."""
    classes = Classes(names=("dark", "gray", "bright"))
    segmenter = Segmenter(Brightness(), classes, architecture="x", mean=(0.0,) * 3, std=(1.0,) * 3)
    estimate_statistics(segmenter, [labeled(SOURCE, step).image for step in range(STEPS)])
    return segmenter


def recalibrated(method: Recalibrate, start: Segmenter, nodata_mask: Tensor | None = None) -> Segmenter:
    nets = method.networks(copy.deepcopy(start))
    assert isinstance(nets, RecalibrateNetworks)
    for step in range(STEPS):
        nets.train()
        method.losses(nets, batch(step, nodata_mask))
        method.after_step(nets, step)
        nets.step = step + 1
    assert distance(nets.start, start) == 0
    return method.inference_network(nets)


def distance(network: nn.Module, other: nn.Module) -> float:
    """Largest difference of a mean or a standard deviation of the first normalization, and of the second's means."""
    first, second = batch_norms(network), batch_norms(other)
    deviations = [norms[0].running_var.sqrt() for norms in (first, second)]  # type: ignore[union-attr]
    values = [(deviations[0], deviations[1])] + [
        (one.running_mean, two.running_mean) for one, two in zip(first, second, strict=True)
    ]
    return max(float((one - two).abs().max()) for one, two in values)


def test_class_weights_keep_the_statistics_of_a_source_with_other_class_shares(start: Segmenter) -> None:
    plain, weighted = (distance(recalibrated(method, start), start) for method in (Recalibrate(), RecalibrateByClass()))
    assert plain > 60  # the means of the domains differ by 0.6 * 160
    assert weighted < 3


def test_half_of_the_share_is_half_of_the_way(start: Segmenter) -> None:
    whole, half = (recalibrated(RecalibrateByClass(share=share), start) for share in (1.0, 0.5))
    for own, middle, before in zip(*map(batch_norms, (whole, half, start)), strict=True):
        expected = (own.running_mean + before.running_mean) / 2
        assert torch.allclose(middle.running_mean, expected)


def test_pixels_without_data_count_in_no_class(start: Segmenter) -> None:
    nodata_mask = torch.zeros(4, 32, 32, dtype=torch.bool)
    nodata_mask[:, :16] = True
    assert distance(recalibrated(RecalibrateByClass(), start, nodata_mask), start) < 4
