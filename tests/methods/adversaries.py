"""Small students, a batch, and gradients, for the tests of methods."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from overfly.core.classes import Classes
from overfly.core.records import IGNORE, Batch, Labeled, Logits
from overfly.models import Network, Segmenter
from overfly.models.deeplabv2 import DeepLabV2

M = TypeVar("M", bound=nn.Module)
CLASSES = Classes(names=("a", "b", "c"))


class Small(Network):
    """Two convolutions to a 4th of the size, a class layer that reads their map, and an auxiliary head or none."""

    stride = 4
    heads = ("auxiliary", "classifier")
    training_heads = ("auxiliary",)
    class_layer = "classifier"

    def __init__(self, aux: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.decoder = nn.Sequential(nn.Conv2d(8, 6, 3, 2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.auxiliary = nn.Conv2d(8, 3, 1, 2) if aux else None
        self.classifier = nn.Conv2d(6, 3, 1)

    def forward(self, image: Tensor) -> Logits:
        """Scores at a 4th of the size."""
        early = self.encoder(image)
        fine = self.decoder(early)
        aux = () if self.auxiliary is None else (self.auxiliary(early),)
        return Logits(self.classifier(fine), aux, features=fine)


def student(network: Network | None = None) -> Segmenter:
    """A small network with an auxiliary head, or the one that is given, in double precision."""
    torch.manual_seed(0)
    network = network or Small()
    return Segmenter(network, CLASSES, architecture="small", mean=(100.0,) * 3, std=(50.0,) * 3).double().train()


def without_aux() -> Segmenter:
    """A small network without training heads."""
    torch.manual_seed(0)
    return student(Small(aux=False))


def with_several_class_layers() -> Segmenter:
    """A small DeepLabV2, whose class scores are a sum."""
    torch.manual_seed(0)
    return student(DeepLabV2(len(CLASSES), 3, blocks=(1, 1, 1, 1)))


def batch(size: int = 64) -> Batch:
    """Two images of each domain, the target's brighter; some pixels have no class."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, size, size, generator=generator) * 200
    label = torch.randint(0, len(CLASSES), (2, size, size), generator=generator)
    label[:, :5] = IGNORE
    return Batch(Labeled(images[:2], label), images[2:] + 50)


def twice(nets: M) -> tuple[M, M]:
    """Networks and their equal, for two ways to the same gradients."""
    return nets.double().train(), copy.deepcopy(nets).double().train()


def backward(terms: Iterable[Tensor]) -> None:
    torch.autograd.backward(torch.stack(list(terms)).sum())


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    other_parameters = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        expected = other_parameters[name].grad
        assert parameter.grad is not None, name
        assert expected is not None, name
        assert expected.any(), name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-10)
