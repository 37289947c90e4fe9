"""How a run is carried out: devices, processes, precision. What it ends in is the recipe's to say."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import nn
from torch.optim import Optimizer

from overfly.core import device as machines
from overfly.core.errors import OverflyError, RecipeError, TrainingError
from overfly.core.records import Batch, Labeled, Losses
from overfly.methods.method import Method, Networks
from overfly.recipe import Recipe

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces each precision it is asked for

T = TypeVar("T")
PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
"""What Fabric calls a recipe's precision."""


@dataclass(frozen=True)
class Engine:
    """How a run is carried out. The number of devices is part of what a run ends in, the rest changes only how fast."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    devices: int = 1
    """Processes, one a device."""
    workers: int = 0
    """Processes that read pictures, for each device; 0: none beside the training itself."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    journal_every: int = 10
    """Steps that one journal line averages."""
    cache: Path | str | None = "memory"
    """Where decoded pictures are kept: a folder, "memory", or None."""
    track: bool = False
    """Whether to write TensorBoard curves."""
    quiet: bool = False
    """Whether to print nothing."""

    def __post_init__(self) -> None:
        least = {"devices": 1, "workers": 0, "checkpoint_every": 1, "journal_every": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                option = name.replace("_", "-")
                raise RecipeError(f"--{option} {getattr(self, name)} is too few; take {bound} or more")


class Step(nn.Module):
    """The one module that Fabric wraps: a method with its networks.

    The batch is handed over beside the call: mixed precision casts what a call is given, and pictures must reach the
    Segmenter's normalization in full precision.
    """

    def __init__(self, method: Method[Any], nets: Networks) -> None:
        super().__init__()
        self.method = method
        self.nets = nets
        self.batch = Batch(Labeled(torch.empty(0), torch.empty(0)), torch.empty(0))

    def forward(self) -> Losses:
        """The method's losses on the batch."""
        losses: Losses = self.method.losses(self.nets, self.batch)
        return losses


def hasten(nets: nn.Module, optimizers: Iterable[Optimizer], precision: str, device: torch.device) -> None:
    """Arrange weights and optimizers as a machine likes them: faster, not different.

    Kernels of 16 bits want channels last in memory. On a processor an optimizer's step is one pass over the memory when
    fused; on a GPU the loss scale of half precision does not go with that and gradient clipping.

    Args:
        nets: whose weights are changed in place.
        optimizers: of these weights.
        precision: the recipe's.
        device: where it will run.
    """
    if precision != "32":
        for weight in nets.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if device.type == "cpu":
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["fused"] = True


def arithmetic(precision: str, device: torch.device) -> str:
    """The precision that a device computes in: bf16 becomes 32 on a processor without kernels of it.

    Emulating them takes many times as long and is no more exact.
    """
    if precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "32"
    return precision


def processes(engine: Engine) -> tuple[int, int]:
    """How many processes train on this machine, and on how many machines; more than one where torchrun started them.

    Raises:
        RecipeError: torchrun has started another number of processes than the devices asked for.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return engine.devices, 1
    here, every = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if engine.devices not in (1, here):
        raise RecipeError(f"torchrun starts {here} processes here, not --devices {engine.devices}; leave --devices out")
    return here, every // here


def launch(recipe: Recipe, engine: Engine) -> Fabric:
    """Start the processes of a run.

    Raises:
        RecipeError: recipe and devices do not go together.
    """
    here, nodes = processes(engine)
    every = here * nodes
    if recipe.batch % every:
        raise RecipeError(f"a batch of {recipe.batch} cannot be shared by {every} devices; change one of them")
    if recipe.batch == every:
        raise RecipeError("batch normalization needs two pictures on each device or more; raise batch")
    device = machines.select_device(engine.device, here)
    if recipe.precision == "16" and device.type == "cpu":
        raise RecipeError("precision 16 needs a GPU; on this processor use precision=bf16 or 32")
    accelerator = {"cuda": "gpu"}.get(device.type, device.type)
    devices: Any = [device.index] if device.index is not None and here == 1 else here
    unsupervised = recipe.method.takes_source and recipe.source is None  # a boundary head then learns nothing
    strategy = DDPStrategy(
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
        find_unused_parameters=recipe.method.leaves_weights_out or unsupervised,
    )
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy if every > 1 else "auto",
        precision=PRECISIONS[arithmetic(recipe.precision, device)],
    )
    fabric.launch()
    return fabric


def fabric_of(recipe: Recipe, fabric: Fabric, engine: Engine) -> Fabric:
    """A fabric with this recipe's precision and a loss scale of its own.

    Raises:
        RecipeError: several processes are running, and this recipe needs others than they were started for.
    """
    if fabric.world_size == 1:
        return launch(recipe, engine)
    wanted = Fabric(precision=PRECISIONS[arithmetic(recipe.precision, fabric.device)])
    same = type(fabric.strategy.precision) is type(wanted.strategy.precision)
    if not same or recipe.precision == "16" or recipe.batch % fabric.world_size or recipe.batch == fabric.world_size:
        raise RecipeError(
            "these recipes differ in precision or cannot share their batch, and several processes serve them together; "
            "run them one by one"
        )
    return fabric


def on_main(fabric: Fabric, work: Callable[[], T]) -> T:
    """Do something in the first process alone; all get its result, or its error.

    Args:
        fabric: launched.
        work: what to do; its result travels to the other processes.
    """
    if fabric.world_size == 1:
        return work()
    found: tuple[T | None, OverflyError | None] = (None, None)
    if fabric.is_global_zero:
        try:
            found = (work(), None)
        except OverflyError as error:
            found = (None, error)
        except OSError as error:
            found = (None, TrainingError(f"{error.filename}: {error.strerror}; put this right and try again"))
    result, wrong = fabric.broadcast(found)
    if wrong is not None:
        raise wrong
    return result  # type: ignore[return-value]
