"""Devices, processes and precision of training, by Lightning Fabric."""

import copy
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from overfly.core.atomic_files import json_sha256, read_json, write_json
from overfly.core.classes import Classes
from overfly.core.device import describe_machine, select_device
from overfly.core.download import cache_folder
from overfly.core.errors import OverflyError, RecipeError, TrainingError
from overfly.core.optimizers import SGD
from overfly.core.progress import print_status
from overfly.core.records import Batch, Labeled, Losses
from overfly.evaluation.speed import Latency, compare_latency
from overfly.methods.method import Method, Networks
from overfly.methods.source_only import SourceOnly
from overfly.models.network import Network, build
from overfly.models.segmenter import Segmenter
from overfly.recipe import Recipe

if TYPE_CHECKING:
    from types import FrameType

    from lightning_fabric import Fabric

T = TypeVar("T")
PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
"""Fabric's name of each precision of a recipe."""


class Arithmetic(NamedTuple):
    """What training computes in."""

    precision: str
    """32, or mixed with bf16 or 16."""
    channels_last: bool
    """Memory format of the weights of convolutions, and so of all features."""

    def __str__(self) -> str:
        return self.precision + ", channels-last" * self.channels_last


ARITHMETICS = tuple(Arithmetic(precision, last) for precision in ("32", "bf16") for last in (False, True))
"""Candidates of precision ``auto``."""
MARGIN = 1.05
"""An earlier candidate is chosen unless a later one is faster by more than this factor."""
SLOW = 4.0
"""A candidate that takes longer than this factor in a small step, such as bf16 on a CPU that emulates it, is out."""


@dataclass(frozen=True)
class TrainerConfig:
    """Options of training outside the recipe. Only the number of devices changes the resulting weights."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    devices: int = 1
    """Processes, one per device."""
    workers: int = 0
    """Processes that read images, per device; 0: a thread of the training process reads them."""
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
        return self.method.losses(self.nets, self.batch)


def apply_performance_settings(
    nets: nn.Module, optimizers: Iterable[Optimizer], *, channels_last: bool, device: torch.device
) -> None:
    """Enable channels-last weights, and fused optimizers on the CPU.

    The networks are changed in place. Fused optimizers stay off on a GPU: the loss scale of precision 16 does not
    support them with gradient clipping.
    """
    if channels_last:
        for weight in nets.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    if device.type == "cpu":
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["fused"] = True


def named_arithmetic(precision: str, device: torch.device) -> Arithmetic:
    """Return the arithmetic of a recipe's precision: 32 for auto, and for bf16 on a CPU that would emulate it."""
    emulated = precision == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Arithmetic("32" if emulated or precision == "auto" else precision, precision in ("bf16", "16"))


def choose_arithmetic(
    recipe: Recipe, device: torch.device, processes: int = 1, *, start: Path | None = None, quiet: bool = True
) -> Arithmetic:
    """Return the arithmetic of a recipe; with precision ``auto`` that of the fastest step in one process.

    The times are kept in the cache folder, by machine, threads, version of PyTorch, network, crop and batch. A network
    with a checkpoint is read from the weights file ``start`` if there is one: the checkpoint may be gone.
    """
    if recipe.precision != "auto" or processes > 1 or device.type == "mps":
        return named_arithmetic(recipe.precision, device)
    domain = recipe.source or recipe.domain("target")
    shape = {"classes": len(domain.classes), "bands": domain.bands, "size": recipe.crop, "batch": recipe.batch}
    machine = {key: value for key, value in describe_machine(device).items() if key in ("device", "threads", "torch")}
    facts = {"network": recipe.model.architecture, **shape, **machine}
    file = cache_folder() / "training" / f"{json_sha256(facts)[:16]}.json"
    seconds: Mapping[str, float] = {}
    with suppress(OSError, ValueError, LookupError, AttributeError):
        seconds = {str(each): float(time) for each, time in read_json(file)["seconds"].items()}
    if not seconds.keys() & {str(each) for each in ARITHMETICS}:
        network = recipe.model.architecture
        timed_network = Segmenter.load(start).network if start and recipe.model.checkpoint else network
        seconds = {str(one): time for one, time in time_arithmetics(timed_network, **shape, device=device).items()}
        with suppress(OSError):  # timed again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**facts, "seconds": seconds})
    timed = {each: seconds[str(each)] for each in ARITHMETICS if str(each) in seconds}
    chosen = next(each for each, time in timed.items() if time <= MARGIN * min(timed.values()))
    compared = ", ".join(f"{each}: {1e3 * time:.0f} ms" for each, time in timed.items()).replace(", ch", " ch")
    print_status(f"precision: {chosen} (a step on this machine: {compared})", quiet=quiet)
    return chosen


def time_arithmetics(
    network: str | Network, *, classes: int, bands: int, size: int, batch: int, device: torch.device
) -> dict[Arithmetic, float]:
    """Measure the seconds of a source-only training step in each of `ARITHMETICS`, in turn, without those too `SLOW`.

    The network, or one of this name with random weights, gets a batch of random images, ``size`` pixels a side.
    """
    names = Classes(names=tuple(f"class {number}" for number in range(classes)))
    built = build(network, classes, training_heads=True, bands=bands) if isinstance(network, str) else network
    segmenter = Segmenter(built, names, architecture="", mean=[127.0] * bands, std=[64.0] * bands)

    def steps(side: int, images: int, candidates: Iterable[Arithmetic]) -> dict[str, Callable[[], None]]:
        label = torch.randint(classes, (images, side, side), device=device)
        batch = Batch(Labeled(torch.rand(images, bands, side, side, device=device) * 255, label), torch.empty(0))
        copies = {each: Networks(copy.deepcopy(segmenter)) for each in candidates}
        return {str(one): partial(plain_step(SourceOnly(), nets, one, device), batch) for one, nets in copies.items()}

    def seconds(latency: Latency) -> float:  # other processes do not lengthen the CPU's time, which threads add up
        return (latency.cpu_ms if device.type == "cpu" and torch.get_num_threads() == 1 else latency.min_ms) / 1e3

    small = compare_latency(steps(min(size, 128), min(batch, 2), ARITHMETICS), rounds=3)
    fastest = min(map(seconds, small.values()))
    remaining = [each for each in ARITHMETICS if seconds(small[str(each)]) <= SLOW * fastest]
    timed = compare_latency(steps(size, batch, remaining), rounds=5, seconds=5.0)
    return {each: seconds(timed[str(each)]) for each in remaining}


def plain_step(
    method: Method[Any], nets: Networks, arithmetic: Arithmetic, device: torch.device
) -> Callable[[Batch], None]:
    """Return a function that takes one optimizer step of a method on a batch and waits for the device.

    The networks are changed in place, at a learning rate near 0.
    """
    module, optimizers = LossModule(method, nets).to(device).train(), method.optimizers(nets, SGD(lr=1e-12))
    apply_performance_settings(nets, optimizers, channels_last=arithmetic.channels_last, device=device)
    dtype = torch.float16 if arithmetic.precision == "16" else torch.bfloat16

    def step(batch: Batch) -> None:
        module.batch = batch
        with torch.autocast(device.type, dtype, enabled=arithmetic.precision != "32"):
            losses = module()
        if losses:
            torch.autograd.backward(torch.stack(list(losses.values())).sum())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


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


def launch_fabric(recipe: Recipe, config: TrainerConfig, arithmetic: Arithmetic | None = None) -> "Fabric":
    """Start the processes of a run; raise `RecipeError` if the recipe does not fit the devices.

    Without ``arithmetic`` it computes in the precision that the recipe names, in 32 bits for ``auto``.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it logs the choice of each precision
    local, machines = process_counts(config)
    world = local * machines
    if recipe.batch % world:
        raise RecipeError(f"batch must be a multiple of the {world} devices, got {recipe.batch}")
    if recipe.batch == world:
        raise RecipeError(f"batch must be at least {2 * world}, two per device for normalization, got {recipe.batch}")
    device = select_device(config.device, local)
    if recipe.precision == "16" and device.type == "cpu":
        raise RecipeError("precision 16 needs a GPU; set precision=bf16 or precision=32 on a CPU")
    devices: Any = [device.index] if device.index is not None and local == 1 else local
    # without a source, a boundary head has no gradient
    without_source = recipe.method.uses_optional_source and recipe.source is None
    strategy = DDPStrategy(
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
        find_unused_parameters=bool(recipe.method.has_unused_parameters or without_source or recipe.model.checkpoint),
    )
    fabric = Fabric(
        accelerator={"cuda": "gpu"}.get(device.type, device.type), devices=devices, num_nodes=machines,
        strategy=strategy if world > 1 else "auto",
        precision=PRECISIONS[(arithmetic or named_arithmetic(recipe.precision, device)).precision],
    )  # fmt: skip
    fabric.launch()
    return fabric


def recipe_fabric(recipe: Recipe, fabric: "Fabric", config: TrainerConfig, arithmetic: Arithmetic) -> "Fabric":
    """Return a fabric of this precision, with its own loss scale; raise `RecipeError` if processes cannot share it."""
    from lightning_fabric import Fabric

    if fabric.world_size == 1:
        return launch_fabric(recipe, config, arithmetic)
    required = Fabric(precision=PRECISIONS[arithmetic.precision])
    same = type(fabric.strategy.precision) is type(required.strategy.precision)
    if not same or recipe.precision == "16" or recipe.batch % fabric.world_size or recipe.batch == fabric.world_size:
        raise RecipeError(
            "with several processes all recipes need one precision (not 16) and a batch that the devices can share; "
            "run these recipes one by one"
        )
    return fabric


def run_on_rank_zero(fabric: "Fabric", work: Callable[[], T]) -> T:
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


def any_rank(fabric: "Fabric", flag: bool) -> bool:
    """Return whether the flag is true in any process."""
    if fabric.world_size == 1:
        return flag
    return bool(fabric.all_reduce(torch.tensor(float(flag)), reduce_op="sum"))


def optimizer_step(fabric: "Fabric", module: nn.Module, optimizers: Sequence[Any], clip: float | None) -> None:
    """Clip the gradients of each optimizer, step all optimizers, and reset the gradients.

    In precision 16 all optimizers share one loss scale, which is updated once after all steps, so that each optimizer
    unscales its gradients by the scale that they were multiplied by. Optimizers without gradients are then skipped,
    such as the critic's while only the student trains. Module and optimizers are as set up by Fabric; ``clip`` is the
    largest gradient norm of each optimizer, None: unlimited.
    """

    def has_gradients(optimizer: Any) -> bool:
        return any(value.grad is not None for group in optimizer.param_groups for value in group["params"])

    scaler = getattr(fabric.strategy.precision, "scaler", None)
    active = [optimizer for optimizer in optimizers if scaler is None or has_gradients(optimizer)]
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


@contextmanager
def delayed_signals(stoppable: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Delay Ctrl-C and SIGTERM while ``stoppable`` is False, up to a second one; yield a function that raises them."""
    delayed: list[int] = []

    def handle(number: int, frame: "FrameType | None") -> None:
        if stoppable() or delayed:
            handlers[number](number, frame)
        delayed.append(number)

    def raise_delayed() -> None:
        if delayed:
            handlers[delayed[0]](delayed[0], None)

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in known.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, handle)
        yield raise_delayed
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
