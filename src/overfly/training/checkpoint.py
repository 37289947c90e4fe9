"""All state of a run in one file: networks, optimizers, the step, the loss scale. Whole or not there."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.optim import Optimizer

from overfly.core.errors import RunError
from overfly.methods.method import Networks

DAMAGE = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, pickle.UnpicklingError,
)  # fmt: skip
"""What reading a damaged or foreign checkpoint raises."""


def save_state(
    path: Path, state: dict[str, Any], nets: Networks, optimizers: Sequence[Optimizer], fabric: Fabric
) -> None:
    """Write a checkpoint beside its place, then put it there; a crash leaves the one before.

    Args:
        path: of the checkpoint.
        state: step and what selection remembers; plain values.
        nets: every network of the method.
        optimizers: as the method made them.
        fabric: its precision may scale the loss, which is state too.
    """
    whole = {
        "state": state,
        "nets": nets.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "precision": fabric.strategy.precision.state_dict(),
    }
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise RunError(f"{path} cannot be written ({reason}); free space; the checkpoint before is kept") from None


def load_state(path: Path, nets: Networks, optimizers: Sequence[Optimizer], fabric: Fabric) -> dict[str, Any]:
    """Put a checkpoint back where it was taken from.

    Returns:
        The plain values of ``state``.

    Raises:
        RunError: the file is damaged, or another method's.
    """
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
        nets.load_state_dict(whole["nets"])
        for optimizer, saved in zip(optimizers, whole["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if whole["precision"]:
            fabric.strategy.precision.load_state_dict(whole["precision"])
        found: dict[str, Any] = whole["state"]
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path} cannot be resumed from ({reason}); delete it to train from the start") from None
    return found
