"""The one training loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from overfly.core import device as machines
from overfly.core.errors import RecipeError, TrainingError
from overfly.core.optim import set_rate
from overfly.core.records import Batch, Labelled, Losses
from overfly.data.loading import Steps, loader
from overfly.methods.method import Method, Networks
from overfly.models.segmenter import Segmenter
from overfly.ops.augment import augment
from overfly.recipe import Recipe
from overfly.scoring.score import score
from overfly.training.checkpoint import load_state, save_state
from overfly.training.progress import Progress
from overfly.training.run import Run
from overfly.training.start import first_segmenter, streams


@dataclass(frozen=True)
class Engine:
    """How a run is carried out; nothing here changes what it ends in."""

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


class Step(nn.Module):
    """The one module that Fabric wraps: a method with its networks."""

    def __init__(self, method: Method[Any], nets: Networks) -> None:
        super().__init__()
        self.method = method
        self.nets = nets

    def forward(self, batch: Batch) -> Losses:
        """The method's losses."""
        losses: Losses = self.method.losses(self.nets, batch)
        return losses


def launch(recipe: Recipe, engine: Engine) -> Fabric:
    """Start the processes of a run."""
    if recipe.batch % engine.devices:
        raise RecipeError(f"a batch of {recipe.batch} cannot be shared by {engine.devices} devices; change one of them")
    if recipe.batch == engine.devices:
        raise RecipeError("batch normalisation needs two pictures on each device or more; raise batch")
    device = machines.pick(engine.device)
    if recipe.precision == "16" and device.type == "cpu":
        raise RecipeError("precision 16 needs a GPU; on this processor use precision=bf16 or 32")
    accelerator = {"cuda": "gpu"}.get(device.type, device.type)
    devices: Any = [device.index] if device.index is not None and engine.devices == 1 else engine.devices
    strategy = DDPStrategy(process_group_backend="nccl" if device.type == "cuda" else "gloo")
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy if engine.devices > 1 else "auto",
        precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[recipe.precision],  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its folder is made."""

    steps: Steps
    """What each step sees."""
    nets: Networks
    """Every network of the method, at its beginning."""
    length: int
    """Steps of the optimiser."""


def prepare(recipe: Recipe, fabric: Fabric, engine: Engine, start: Path | None = None) -> Prepared:
    """Find the data and build the networks; nothing is written.

    Args:
        recipe: the experiment.
        fabric: launched.
        engine: where decoded pictures are kept.
        start: weights file that the recipe's ``start`` came to.

    Raises:
        OverflyError: data, weights and recipe do not go together.
    """
    source, target = streams(recipe, engine.cache)
    steps = Steps(source, target, fabric.global_rank, fabric.world_size)
    torch.manual_seed(recipe.seed)
    nets = recipe.method.networks(first_segmenter(recipe, start))
    return Prepared(steps, nets, recipe.length(len(source.items) if source else 0))


def fit(run: Run, prepared: Prepared, fabric: Fabric, engine: Engine) -> Run:
    """Train a run to its end, from wherever it stands.

    Args:
        run: the folder, with its recipe.
        prepared: data and networks.
        fabric: launched; its devices do the work.
        engine: what changes only how fast it goes.

    Raises:
        TrainingError: a loss was not finite; the last checkpoint is kept.
    """
    training = Training(run, fabric, engine, prepared)
    training.begin()
    training.go()
    training.end()
    return run


class Training:
    """One run in motion."""

    def __init__(self, run: Run, fabric: Fabric, engine: Engine, prepared: Prepared) -> None:
        self.run, self.fabric, self.engine, self.recipe = run, fabric, engine, run.recipe
        self.steps, self.nets, self.length = prepared.steps, prepared.nets, prepared.length
        nets = self.nets
        self.state: dict[str, Any] = {"step": 0, "best": None, "best_step": 0, "stale": 0, "stopped": False}
        self.optimizers: list[Optimizer] = self.recipe.method.optimizers(nets, self.recipe.optim)
        module = Step(self.recipe.method, nets)
        if self.optimizers:
            self.step, *wrapped = fabric.setup(module, *self.optimizers)
            self.wrapped = wrapped
        else:
            self.step, self.wrapped = fabric.to_device(module), []
        self.main = fabric.is_global_zero
        self.journal = run.journal
        self.began = time.monotonic()

    def begin(self) -> None:
        """Take up the last checkpoint, or write down that the run begins."""
        if self.run.checkpoint.exists():
            self.state |= load_state(self.run.checkpoint, self.nets, self.optimizers, self.fabric)
        if self.main:
            self.journal.rewind(self.state["step"])
            machine = self.run.machine or {"started": datetime.now(UTC).isoformat(), "took_s": 0.0}
            machine |= machines.describe(self.fabric.device) | {"processes": self.fabric.world_size, "finished": None}
            self.run.record("machine.json", machine)
            if self.engine.track:
                from overfly.training.journal import TensorBoard

                self.journal.sinks.append(TensorBoard(self.run.path / "tensorboard"))
        self.fabric.barrier()

    def go(self) -> None:
        """Every step that is left."""
        if self.state["stopped"]:
            return
        recipe, accumulate = self.recipe, self.recipe.accumulate
        first = self.state["step"]
        batches = iter(
            loader(
                self.steps,
                first * accumulate,
                self.length * accumulate,
                workers=self.engine.workers,
                pin=self.fabric.device.type == "cuda",
            )
        )
        progress = Progress(self.run.path.name, first, self.length, quiet=self.engine.quiet or not self.main)
        window: list[dict[str, Tensor]] = []
        with progress:
            for number in range(first, self.length):
                factor = recipe.schedule.factor(number, self.length)
                set_rate(self.optimizers, factor)
                window.append(self.one(number, batches))
                self.state["step"] = number + 1
                if (number + 1) % self.engine.journal_every == 0 or number + 1 == self.length:
                    figures = {key: float(value) for key, value in _mean(window).items()}
                    figures["lr"] = recipe.optim.lr * factor
                    progress.update(number + 1, figures, recipe.batch * accumulate)
                    if self.main:
                        self.journal.write(number + 1, **figures)
                    window.clear()
                stop = self.state["stopped"] = self.validate(number + 1)
                if stop or (number + 1) % self.engine.checkpoint_every == 0 or number + 1 == self.length:
                    self.save()
                if stop:
                    break

    def one(self, number: int, batches: Any) -> dict[str, Tensor]:
        """One step of the optimiser; its loss terms."""
        accumulate = self.recipe.accumulate
        total: dict[str, Tensor] = {}
        self.step.train()
        for part in range(accumulate):
            micro = number * accumulate + part
            batch = self.prepare(next(batches), micro)
            last = part == accumulate - 1
            with nullcontext() if last else self.fabric.no_backward_sync(self.step):
                losses: Losses = self.step(batch)
                self.check(losses, number, micro)
                if losses:
                    self.fabric.backward(torch.stack(list(losses.values())).sum() / accumulate)
            for key, value in losses.items():
                total[key] = total.get(key, torch.zeros((), device=value.device)) + value.detach().float() / accumulate
        if self.recipe.clip is not None:
            for optimizer in self.wrapped:
                self.fabric.clip_gradients(self.step, optimizer, max_norm=self.recipe.clip, error_if_nonfinite=False)
        for optimizer in self.wrapped:
            optimizer.step()
            optimizer.zero_grad()
        self.recipe.method.after_step(self.nets, number)
        return total

    def prepare(self, batch: Batch, micro: int) -> Batch:
        """Move a batch to the device, seed this step's random choices, and augment the source."""
        seed = (self.recipe.seed * 1_000_003 + micro) * 1_009 + self.fabric.global_rank
        torch.manual_seed(2 * seed)
        generator = torch.Generator().manual_seed(2 * seed + 1)
        batch = self.fabric.to_device(batch)
        if batch.source.image.shape[0] and self.recipe.augment:
            peak = self.recipe.domain("source").peak
            source = augment(batch.source, self.recipe.augment, peak=peak, generator=generator)
            batch = batch._replace(source=Labelled(*source))
        return batch

    def check(self, losses: Losses, number: int, micro: int) -> None:
        """Stop where a loss is not finite, before it reaches the weights."""
        if not losses:
            return
        finite = torch.stack([value.detach() for value in losses.values()]).isfinite()
        bad = self.fabric.all_reduce((~finite.all()).float(), reduce_op="sum") if self.fabric.world_size > 1 else None
        if bool(finite.all()) if bad is None else not float(torch.as_tensor(bad)):
            return
        terms = ", ".join(f"{key} = {float(value.detach())}" for key, value in losses.items())
        names = ", ".join(self.steps.names(micro))
        kept = self.run.checkpoint if self.run.checkpoint.exists() else "none yet"
        if self.main:
            self.journal.write(number, event="not finite", terms=terms, items=names)
        raise TrainingError(
            f"the loss is not finite at step {number} ({terms}; pictures: {names}); lower optim.lr or set clip, or "
            f"look at these pictures with `overfly data check`; the last good checkpoint is kept: {kept}"
        )

    def validate(self, number: int) -> bool:
        """Score the source's held-out labels when it is time; whether training should stop."""
        rule = self.recipe.validation
        if not rule.every or (number % rule.every and number != self.length):
            return False
        network = self.recipe.method.deployed(self.nets)
        if self.main:
            found = score(
                network, self.recipe.domain("source"), rule.split,
                resize=self.recipe.resize, device=self.fabric.device,
            )  # fmt: skip
            self.journal.write(number, event="validation", source_miou=found.miou)
            value = found.miou or 0.0
        else:
            value = 0.0
        value = float(self.fabric.broadcast(value))
        if self.state["best"] is None or value > self.state["best"]:
            self.state |= {"best": value, "best_step": number, "stale": 0}
            if rule.select == "best":
                self.keep()
        else:
            self.state["stale"] += 1
        return bool(rule.patience and self.state["stale"] >= rule.patience)

    def keep(self) -> None:
        """Write the network as it stands as the run's own."""
        network = self.recipe.method.deployed(self.nets)
        if self.main and isinstance(network, Segmenter):
            network.save(self.run.weights)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.main:
            save_state(self.run.checkpoint, self.state, self.nets, self.optimizers, self.fabric)
        self.fabric.barrier()

    def end(self) -> None:
        """Keep the last weights unless a better validation was kept, and write down that the run is whole."""
        rule = self.recipe.validation
        if not rule.every or rule.select == "last" or not self.run.weights.exists():
            self.keep()
        if self.main:
            machine = self.run.machine
            took = float(machine.get("took_s") or 0.0) + time.monotonic() - self.began
            finished = datetime.now(UTC).isoformat()
            self.run.record("machine.json", machine | {"took_s": round(took, 1), "finished": finished})
        self.fabric.barrier()


def _mean(window: list[dict[str, Tensor]]) -> Mapping[str, Tensor]:
    """Mean of each term over the steps that had it."""
    keys = dict.fromkeys(key for row in window for key in row)
    return {key: torch.stack([row[key] for row in window if key in row]).mean() for key in keys}


__all__ = ["Engine", "Prepared", "Step", "Training", "fit", "launch", "prepare"]
