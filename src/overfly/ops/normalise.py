"""Batch normalisation: its statistics, and estimating them again on other images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """All batch normalisations of a module that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]


def forget_statistics(module: nn.Module) -> None:
    """Set the running statistics of a module to those of no data, to be averaged anew over all batches that follow."""
    for norm in batch_norms(module):
        norm.reset_running_stats()
        norm.momentum = None


@contextmanager
def collecting_statistics(module: nn.Module) -> Iterator[None]:
    """Batch normalisations see batches as in training, everything else (dropout too) behaves as at test time."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    for norm in batch_norms(module):
        norm.train()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode
