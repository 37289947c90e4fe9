"""Devices, processes and precision of training, by Lightning Fabric."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from overfly.core.device import select_device
from overfly.core.errors import OverflyError, RecipeError, TrainingError
from overfly.core.records import Batch, Labeled, Losses
from overfly.methods.method import Method, Networks
from overfly.recipe import Recipe

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it logs the choice of each precision

T = TypeVar("T")
PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
"""Fabric's name of each precision of a recipe."""


@dataclass(frozen=True)
class TrainerConfig:
    """Options of training outside the recipe. Only the number of devices changes the resulting weights."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    devices: int = 1
    """Processes, one per device."""
    workers: int = 0
    """Processes that read images, per device; 0: the training process reads them."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps that one line of log.jsonl averages. Losses are checked for being finite at the same interval."""
    cache: Path | str | None = "memory"
    """Where decoded images are cached: a folder, "memory", or None."""
    tensorboard: bool = False
    """Whether to write TensorBoard curves."""
    quiet: bool = False
    """Whether to print nothing."""

    def __post_init__(self) -> None:
        minimum = {"devices": 1, "workers": 0, "checkpoint_every": 1, "log_every": 1}
        for name, bound in minimum.items():
            if getattr(self, name) < bound:
                option = name.replace("_", "-")
                raise RecipeError(f"--{option} must be at least {bound}, got {getattr(self, name)}")


class LossModule(nn.Module):
    """A method with its networks, as the one module that Fabric wraps; its forward pass returns the losses.

    The batch is an attribute instead of an argument: mixed precision casts arguments, and images must reach the
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


def apply_performance_settings(
    nets: nn.Module, optimizers: Iterable[Optimizer], precision: str, device: torch.device
) -> None:
    """Enable channels-last weights for 16-bit precision, and fused optimizers on the CPU.

    The networks are changed in place. Fused optimizers stay off on a GPU: the loss scale of precision 16 does not
    support them with gradient clipping.
    """
    if precision != "32":
        for weight in nets.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if device.type == "cpu":
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["fused"] = True


def effective_precision(precision: str, device: torch.device) -> str:
    """Return the precision to compute in: 32 instead of bf16 on a CPU that would emulate it."""
    if precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "32"
    return precision


def process_counts(config: TrainerConfig) -> tuple[int, int]:
    """Return processes on this machine and machines (torchrun); raise `RecipeError` if ``config.devices`` differs."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return config.devices, 1
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if config.devices not in (1, local):
        raise RecipeError(
            f"torchrun starts {local} processes on this machine, got --devices {config.devices}; leave --devices out"
        )
    return local, world // local


def launch_fabric(recipe: Recipe, config: TrainerConfig) -> Fabric:
    """Start the processes of a run; raise `RecipeError` if the recipe does not fit the devices."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    local, machines = process_counts(config)
    world = local * machines
    if recipe.batch % world:
        raise RecipeError(f"batch must be a multiple of the {world} devices, got {recipe.batch}")
    if recipe.batch == world:
        raise RecipeError(
            f"batch must be at least {2 * world}, two images per device for batch normalization, got {recipe.batch}"
        )
    device = select_device(config.device, local)
    if recipe.precision == "16" and device.type == "cpu":
        raise RecipeError("precision 16 needs a GPU; set precision=bf16 or precision=32 on a CPU")
    devices: Any = [device.index] if device.index is not None and local == 1 else local
    # without a source, a boundary head has no gradient
    without_source = recipe.method.uses_optional_source and recipe.source is None
    strategy = DDPStrategy(
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
        find_unused_parameters=recipe.method.has_unused_parameters or without_source,
    )
    fabric = Fabric(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=devices,
        num_nodes=machines,
        strategy=strategy if world > 1 else "auto",
        precision=PRECISIONS[effective_precision(recipe.precision, device)],
    )
    fabric.launch()
    return fabric


def recipe_fabric(recipe: Recipe, fabric: Fabric, config: TrainerConfig) -> Fabric:
    """Return a fabric of this recipe's precision and loss scale; raise `RecipeError` if processes cannot share it."""
    from lightning_fabric import Fabric

    if fabric.world_size == 1:
        return launch_fabric(recipe, config)
    required = Fabric(precision=PRECISIONS[effective_precision(recipe.precision, fabric.device)])
    same = type(fabric.strategy.precision) is type(required.strategy.precision)
    if not same or recipe.precision == "16" or recipe.batch % fabric.world_size or recipe.batch == fabric.world_size:
        raise RecipeError(
            "with several processes all recipes need one precision (not 16) and a batch that the devices can share; "
            "run these recipes one by one"
        )
    return fabric


def run_on_rank_zero(fabric: Fabric, work: Callable[[], T]) -> T:
    """Call a function in the first process only; all processes return its picklable result or raise its error."""
    if fabric.world_size == 1:
        return work()
    outcome: tuple[T | None, OverflyError | None] = (None, None)
    if fabric.is_global_zero:
        try:
            outcome = (work(), None)
        except OverflyError as error:
            outcome = (None, error)
        except OSError as error:
            outcome = (None, TrainingError(f"{error.filename}: {error.strerror}; correct this and try again"))
    result, failure = fabric.broadcast(outcome)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def any_rank(fabric: Fabric, flag: bool) -> bool:
    """Return whether the flag is true in any process."""
    if fabric.world_size == 1:
        return flag
    return bool(fabric.all_reduce(torch.tensor(float(flag)), reduce_op="sum"))


def optimizer_step(fabric: Fabric, module: nn.Module, optimizers: Sequence[Any], clip: float | None) -> None:
    """Clip the gradients of each optimizer, step all optimizers, and reset the gradients.

    In precision 16 all optimizers share one loss scale, which is updated once after all steps, so that each optimizer
    unscales its gradients by the scale that they were multiplied by. Optimizers without gradients are then skipped,
    such as the critic's while only the student trains.

    Args:
        fabric: launched.
        module: as set up by Fabric.
        optimizers: as set up by Fabric.
        clip: largest gradient norm of each optimizer; None: unlimited.
    """
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    active = [optimizer for optimizer in optimizers if scaler is None or _has_gradients(optimizer)]
    if clip is not None:
        for optimizer in active:
            fabric.clip_gradients(module, optimizer, max_norm=clip, error_if_nonfinite=False)
    for optimizer in active:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer.optimizer)
    if scaler is not None and active:
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()


def _has_gradients(optimizer: Any) -> bool:
    return any(value.grad is not None for group in optimizer.param_groups for value in group["params"])
