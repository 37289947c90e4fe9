"""The checkpoint: networks, optimizers, loss scale and step of a run in one file, written atomically."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.optim import Optimizer

from overfly.core.atomic_files import atomic_write
from overfly.core.errors import RunError
from overfly.methods.method import Networks

UNREADABLE = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, pickle.UnpicklingError,
)  # fmt: skip
"""Errors raised by loading a damaged or foreign checkpoint."""


def save_state(
    path: Path, state: dict[str, Any], nets: Networks, optimizers: Sequence[Optimizer], fabric: Fabric
) -> None:
    """Write a checkpoint atomically; the one before survives a crash.

    Args:
        path: of the checkpoint.
        state: step and results of model selection; plain values.
        nets: every network of the method.
        optimizers: in the method's order.
        fabric: its precision plugin may hold the scale of the loss.

    Raises:
        RunError: the file cannot be written.
    """
    checkpoint = {
        "state": state,
        "nets": nets.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "precision": fabric.strategy.precision.state_dict(),
    }
    path.parent.mkdir(exist_ok=True)
    try:
        with atomic_write(path) as part, part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise RunError(f"{path} cannot be written ({reason}); free space; the checkpoint before is kept") from None


def load_state(path: Path, nets: Networks, optimizers: Sequence[Optimizer], fabric: Fabric) -> dict[str, Any]:
    """Load a checkpoint into networks, optimizers and precision.

    Returns:
        The plain values of ``state``.

    Raises:
        RunError: the file is damaged, or of another method.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        nets.load_state_dict(checkpoint["nets"])
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if checkpoint["precision"]:
            fabric.strategy.precision.load_state_dict(checkpoint["precision"])
        state: dict[str, Any] = checkpoint["state"]
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path} cannot be resumed from ({reason}); delete it to train from the start") from None
    return state
