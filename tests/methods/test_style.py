"""Methods that restyle source images take the style of the domain, not that of a crop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from overfly.core.records import Batch, Labeled
from overfly.methods.fda import FDA, ColorTransfer
from overfly.methods.method import Method
from overfly.recipe import load
from overfly.training.setup import initial_network

DARK, BRIGHT = 40.0, 160.0
"""The color of two classes, in both domains."""


def crop(value: float, seed: int) -> Tensor:
    """A crop (3, 64, 64) that shows one class alone."""
    return value + 8 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(seed))


def batch(source: tuple[float, ...], target: tuple[float, ...], gain: float = 1.0) -> Batch:
    images = torch.stack([crop(value, number) for number, value in enumerate(source)])
    others = gain * torch.stack([crop(value, 9 + number) for number, value in enumerate(target)])
    return Batch(Labeled(images, torch.zeros(len(images), 64, 64, dtype=torch.int64)), others)


def restyled(method: Method[Any], small: dict[str, Any], *batches: Batch) -> Tensor:
    """Mean value of each source image of the last batch, as the student sees it."""
    nets: Any = method.networks(initial_network(load(small))[0]).train()
    seen: list[Tensor] = []
    nets.student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for step, each in enumerate(batches):
        method.losses(nets, each)
        method.after_step(nets, step)
    return seen[-1][: len(batches[-1].source.image)].mean((1, 2, 3))


@pytest.mark.parametrize("method", [FDA(cycles=1), ColorTransfer()], ids=lambda method: method.name)
def test_a_crop_of_one_class_keeps_its_color(method: Method[Any], small: dict[str, Any]) -> None:
    """Both domains show both classes; a source crop of one is drawn with a target crop of the other."""
    both, crossed = batch((DARK, BRIGHT), (BRIGHT, DARK)), batch((DARK, DARK), (BRIGHT, BRIGHT))
    mirrored = batch((BRIGHT, BRIGHT), (DARK, DARK))
    found = restyled(method, small, both, crossed, mirrored, both, crossed, mirrored, both)
    torch.testing.assert_close(found, torch.tensor([DARK, BRIGHT]), atol=4.0, rtol=0)
    of_image = restyled(method.model_copy(update={"style": "image"}), small, both)
    torch.testing.assert_close(of_image, torch.tensor([BRIGHT, DARK]), atol=4.0, rtol=0)  # the colors are swapped


@pytest.mark.parametrize("method", [FDA(cycles=1), ColorTransfer()], ids=lambda method: method.name)
def test_another_light_reaches_every_crop(method: Method[Any], small: dict[str, Any]) -> None:
    lit = batch((DARK, BRIGHT), (BRIGHT, DARK), gain=1.4)
    torch.testing.assert_close(restyled(method, small, lit, lit), 1.4 * torch.tensor([DARK, BRIGHT]), atol=4.0, rtol=0)
