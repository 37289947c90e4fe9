"""Batch normalization: its statistics, and estimating them again on other images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from overfly.core.records import Logits

M = TypeVar("M", bound=nn.Module)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """All batch normalizations of a module that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]


def forget_statistics(module: nn.Module) -> None:
    """Set the running statistics of a module to those of no data, to be averaged anew over all batches that follow."""
    for norm in batch_norms(module):
        norm.reset_running_stats()
        norm.momentum = None


@contextmanager
def collecting_statistics(module: nn.Module) -> Iterator[None]:
    """Batch normalizations see batches as in training, everything else (dropout too) behaves as at test time."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    for norm in batch_norms(module):
        norm.train()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


@contextmanager
def keeping_statistics(module: nn.Module, *, active: bool = True) -> Iterator[None]:
    """Batch normalizations normalize by their running statistics and leave them alone; all else trains.

    Args:
        module: whose parts are switched.
        active: False changes nothing.
    """
    switched = [norm for norm in batch_norms(module) if norm.training] if active else []
    for norm in switched:
        norm.eval()
    try:
        yield
    finally:
        for norm in switched:
            norm.train()


@contextmanager
def untracked_statistics(module: nn.Module) -> Iterator[None]:
    """Batch normalizations in training normalize by the batch, as ever, and leave their running statistics alone.

    Args:
        module: whose parts are switched.
    """
    switched = [(norm, norm.momentum) for norm in batch_norms(module) if norm.training]
    for norm, _ in switched:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in switched:
            norm.momentum = momentum


@torch.no_grad()
def blend_statistics(module: nn.Module, other: nn.Module, share: float) -> None:
    """Move a module's running means and variances a share of the way to those of another of the same structure.

    Means and variances are blended each by itself, as published (Schneider et al., 2020, arXiv:2006.16971).
    The variance of a mixture would also hold ``share (1 - share)`` times the squared distance of the means; it is left
    out, since a batch at test time comes from one domain alone, and this would shrink every feature that has moved.

    Args:
        module: changed in place.
        other: left alone.
        share: 0 keeps the module's own to the last bit, 1 takes the other's.
    """
    for own, given in zip(batch_norms(module), batch_norms(other), strict=True):
        for name in ("running_mean", "running_var"):
            getattr(own, name).lerp_(getattr(given, name), share)


def replace(module: nn.Module, kind: type[M], make: Callable[[M], nn.Module], skip: Collection[str] = ()) -> None:
    """Put another part in the place of every part of a kind, at any depth.

    Args:
        module: changed in place.
        kind: of the parts to replace.
        make: from a part to what takes its place.
        skip: names of direct children that are left as they are.
    """
    for name, part in module.named_children():
        if name in skip:
            continue
        if isinstance(part, kind):
            setattr(module, name, make(part))
        else:
            replace(part, kind, make)


def together(student: nn.Module, *images: Tensor) -> list[Logits]:
    """Logits of several groups of images, by one forward pass: batch normalization sees them as one batch.

    Separate passes in training would normalize each group by itself and blend running statistics that fit none.

    Args:
        student: returns `Logits`.
        images: groups (B_i, C, H, W) of the same size.
    """
    logits: Logits = student(torch.cat(images))
    found, begin = [], 0
    for group in images:
        found.append(logits.of(slice(begin, begin + len(group))))
        begin += len(group)
    return found
