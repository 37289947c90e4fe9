"""Batch normalization and its statistics; joint forward passes; freezing of weights."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from overfly.core.records import Logits

M = TypeVar("M", bound=nn.Module)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Batch normalizations of a module that have running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]


def reset_statistics(module: nn.Module) -> None:
    """Reset the running statistics of a module, to be averaged equally over all batches that follow."""
    for norm in batch_norms(module):
        norm.reset_running_stats()
        norm.momentum = None


@contextmanager
def restored_modes(module: nn.Module) -> Iterator[None]:
    """Restore every submodule's training or evaluation mode at the end of the block."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def updating_statistics(module: nn.Module) -> Iterator[None]:
    """Put batch normalizations in training mode and everything else, such as dropout, in evaluation mode."""
    with restored_modes(module):
        module.eval()
        for norm in batch_norms(module):
            norm.train()
        yield


@torch.inference_mode()
def estimate_statistics(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running statistics, in place, by averages over batches of images (B, C, H, W)."""
    reset_statistics(module)
    with updating_statistics(module):
        for images in batches:
            module(images)


@contextmanager
def weighted_statistics(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Normalize by the weighted statistics of the batch, and average them over all batches since `reset_statistics`.

    Everything is in evaluation mode. The weight of each pixel (B, H, W), 0 or more, is averaged to the size of each
    layer.
    """

    def normalize(norm: _BatchNorm, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        image = inputs[0]
        share = F.interpolate(weight[:, None].to(image), image.shape[-2:], mode="area")
        share = share / share.sum().clamp_min(1e-12)
        mean = (image * share).sum((0, 2, 3))
        var = ((image - mean.view(1, -1, 1, 1)).square() * share).sum((0, 2, 3))
        count = torch.as_tensor(norm.num_batches_tracked).add_(1)
        for name, value in (("running_mean", mean), ("running_var", var)):
            getattr(norm, name).lerp_(value, 1 / count.float())
        return F.batch_norm(image, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)

    with restored_modes(module):
        module.eval()
        hooks = [norm.register_forward_hook(normalize) for norm in batch_norms(module)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def frozen_statistics(module: nn.Module, *, active: bool = True) -> Iterator[None]:
    """Put batch normalizations in evaluation mode, where their statistics stay; ``active=False`` changes nothing."""
    with restored_modes(module):
        for norm in batch_norms(module) if active else []:
            norm.eval()
        yield


@contextmanager
def untracked_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch normalizations in training use the statistics of the batch without updating the running ones."""
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
    """Interpolate the running means and variances of a module towards those of another of the same structure.

    Means and variances are blended separately (Schneider et al., 2020, arXiv:2006.16971). The variance of a mixture
    would also have ``share (1 - share)`` times the squared distance of the means; it is left out, since a test batch
    comes from one domain alone. ``share`` 0 keeps the module's own bit for bit, 1 takes the other's.
    """
    for own, target in zip(batch_norms(module), batch_norms(other), strict=True):
        for name in ("running_mean", "running_var"):
            getattr(own, name).lerp_(getattr(target, name), share)


def replace_modules(
    module: nn.Module, kind: type[M], make: Callable[[M], nn.Module], skip: Collection[str] = ()
) -> None:
    """Replace, in place, every submodule of a type at any depth, except in the direct children named by ``skip``."""
    for name, part in module.named_children():
        if name in skip:
            continue
        if isinstance(part, kind):
            setattr(module, name, make(part))
        else:
            replace_modules(part, kind, make)


def joint_forward(student: nn.Module, *images: Tensor) -> list[Logits]:
    """Logits of several groups of images (B_i, C, H, W) from one forward pass, normalized by their joint statistics.

    Separate passes would normalize each group by its own statistics and mix running statistics that fit neither.
    """
    return split_logits(student(torch.cat(images)), [len(group) for group in images])


def split_logits(logits: Logits, sizes: list[int]) -> list[Logits]:
    """The logits of each group of images, of ``sizes`` images each, from those of the whole batch."""
    ends = itertools.accumulate(sizes)
    return [logits.select(slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def probe_outputs(student: nn.Module) -> Logits:
    """Output of a student in evaluation mode for one empty image of 64 pixels; modes and statistics stay unchanged."""
    like, bands = next(student.parameters()), int(getattr(student, "bands", 3))
    with restored_modes(student):
        logits: Logits = student.eval()(torch.zeros(1, bands, 64, 64, dtype=like.dtype, device=like.device))
    return logits


def freeze_unused(student: nn.Module, read: Callable[[Logits], tuple[Tensor, ...]]) -> None:
    """Freeze, in place, the trainable weights that a method's losses, which ``read`` some outputs, do not depend on."""
    with torch.enable_grad():
        outputs = read(probe_outputs(student))
        weights = [weight for weight in student.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(torch.stack([out.sum() for out in outputs]).sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)
