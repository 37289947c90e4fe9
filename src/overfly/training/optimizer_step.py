"""One move of all optimizers by the gradients that are there, with or without a scale of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_fabric import Fabric
from torch import nn


def move(fabric: Fabric, module: nn.Module, optimizers: Sequence[Any], clip: float | None) -> None:
    """Clip each optimizer's gradients, let each take its step, and forget the gradients.

    In precision 16 the loss was scaled, once for all optimizers. The scale is moved on when all have taken their step,
    not between them: else the second would divide by another scale than its gradients were multiplied by. One without
    gradients, such as a critic's while the student moves alone, is passed over.

    Args:
        fabric: launched.
        module: as Fabric set it up.
        optimizers: as Fabric set them up.
        clip: largest norm of each optimizer's gradients together; None clips nothing.
    """
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    moving = [each for each in optimizers if scaler is None or _has_gradients(each)]
    if clip is not None:
        for optimizer in moving:
            fabric.clip_gradients(module, optimizer, max_norm=clip, error_if_nonfinite=False)
    for optimizer in moving:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer.optimizer)
    if scaler is not None and moving:
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()


def _has_gradients(optimizer: Any) -> bool:
    return any(value.grad is not None for group in optimizer.param_groups for value in group["params"])


__all__ = ["move"]
