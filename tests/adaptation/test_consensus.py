from __future__ import annotations

import pytest
import torch
from torch import nn

from overfly.adaptation.consensus import consensus
from overfly.evaluation.images import unlabeled_images
from planted import ByLevel, Constant, Patches


def found(*candidates: nn.Module) -> list[float | None]:
    return consensus([(network, None) for network in candidates], list(unlabeled_images(Patches(), "train")))


def test_the_one_that_differs_has_least_of_the_consensus() -> None:
    right, same, exchanged, collapsed = found(ByLevel(20), ByLevel(10), ByLevel(20, (1, 0, 2)), Constant(3.0))
    assert right == same == pytest.approx(1.0)
    assert exchanged is not None
    assert collapsed is not None
    assert exchanged < 0.7
    assert collapsed < 0.4


def test_two_networks_have_no_consensus() -> None:
    assert found(ByLevel(), Constant()) == [None, None]


def test_windows_and_modes_are_of_each_network_are_its_own() -> None:
    images = list(unlabeled_images(Patches(), "train"))
    trained = ByLevel(20).train()
    whole = consensus([(trained, None), (ByLevel(10), 16), (ByLevel(5), None)], images, torch.device("cpu"))
    assert trained.training
    assert whole == pytest.approx([1.0, 1.0, 1.0])
