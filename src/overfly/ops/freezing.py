"""Which weights a loss can reach, and keeping the others as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from overfly.core.records import Logits

SIDE = 64
"""Side of the picture that is tried, in pixels."""


def freeze_unreached(student: nn.Module, bands: int, read: Callable[[Logits], tuple[Tensor, ...]]) -> None:
    """Freeze, in place, the weights that none of some scores depend on; statistics stay as they are.

    Args:
        student: returns `Logits`.
        bands: of its images.
        read: the scores that the losses look at.
    """
    modes = {part: part.training for part in student.modules()}
    with torch.enable_grad():
        device = next(student.parameters()).device
        logits: Logits = student.eval()(torch.zeros(1, bands, SIDE, SIDE, device=device))
        weights = [weight for weight in student.parameters() if weight.requires_grad]
        total = torch.stack([scores.sum() for scores in read(logits)]).sum()
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)
    for part, mode in modes.items():
        part.training = mode
