"""The one training loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim import Optimizer

from overfly.core import device as machines
from overfly.core.errors import OverflyError, RecipeError, TrainingError
from overfly.core.interrupts import interrupts_held
from overfly.core.optimizers import set_rate
from overfly.core.records import Batch, Labeled, Losses
from overfly.data.loading import BatchDataset, batch_loader
from overfly.methods.method import Networks
from overfly.models.segmenter import Segmenter
from overfly.ops.augmentation import augment
from overfly.recipe import Recipe
from overfly.training.checkpoint import load_state, save_state
from overfly.training.engine import Engine, Step, arithmetic, hasten
from overfly.training.optimizer_step import move
from overfly.training.progress import Progress
from overfly.training.run import Run
from overfly.training.setup import first_segmenter, streams
from overfly.training.validation import Watch, journalled


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its folder is made."""

    steps: BatchDataset
    """What each step sees."""
    nets: Networks
    """Every network of the method, at its beginning."""
    optimizers: list[Optimizer]
    """The method's; none where nothing is minimized."""
    length: int
    """Steps of the optimizer."""


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
    torch.manual_seed(recipe.seed)
    nets = recipe.method.networks(first_segmenter(recipe, start))
    optimizers: list[Optimizer] = recipe.method.optimizers(nets, recipe.optim)
    shares = (fabric.global_rank, fabric.world_size) if optimizers else (0, 1)  # (0, 1): all do the same work
    steps = BatchDataset(source, target, *shares)
    first = steps[0]  # what is wrong with the data is best said before there is a folder
    if isinstance(first, OverflyError):
        raise first
    return Prepared(steps, nets, optimizers, recipe.length(len(source.items) if source else 0))


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
        self.state: dict[str, Any] = {
            "step": 0,
            "best": None,
            "best_step": 0,
            "stale": 0,
            "stopped": False,
            "took_s": 0.0,
        }
        self.optimizers = prepared.optimizers
        hasten(nets, self.optimizers, self.recipe.precision, fabric.device)
        self.module = Step(self.recipe.method, nets)
        if self.optimizers:
            self.step, *wrapped = fabric.setup(self.module, *self.optimizers)
            self.wrapped = wrapped
        else:
            self.step, self.wrapped = fabric.to_device(self.module), []
        self.main = fabric.is_global_zero
        self.journal = run.journal
        self.watch = Watch(self.recipe, self.nets, fabric)
        self.began = time.monotonic()

    def begin(self) -> None:
        """Take up the last checkpoint, or write down that the run begins."""
        if self.run.checkpoint.exists():
            self.state |= load_state(self.run.checkpoint, self.nets, self.optimizers, self.fabric)
            if self.state.get("processes", self.fabric.world_size) != self.fabric.world_size:
                raise RecipeError(
                    f"{self.run.path} was begun with --devices {self.state['processes']} and would end otherwise with "
                    f"{self.fabric.world_size}; go on with as many, or delete the folder"
                )
        self.state["processes"] = self.fabric.world_size
        if self.main:
            self.journal.rewind(self.state["step"])
            machine = self.run.machine or {"started": datetime.now(UTC).isoformat()}
            machine |= machines.describe_machine(self.fabric.device) | {"overfly": version("overfly"), "argv": sys.argv}
            machine |= {"processes": self.fabric.world_size, "finished": None}
            machine["precision"] = arithmetic(self.recipe.precision, self.fabric.device)
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
        with interrupts_held():
            batches = iter(
                batch_loader(
                    self.steps,
                    first * accumulate,
                    self.length * accumulate,
                    workers=self.engine.workers,
                    pin=self.fabric.device.type == "cuda",
                )
            )
        progress = Progress(self.run.path.name, first, self.length, quiet=self.engine.quiet or not self.main)
        recent: list[dict[str, Tensor]] = []
        with progress:
            for number in range(first, self.length):
                factor = recipe.schedule.factor(number, self.length)
                set_rate(self.optimizers, factor)
                recent.append(self.one(number, batches))
                self.state["step"] = number + 1
                if (number + 1) % self.engine.journal_every == 0 or number + 1 == self.length:
                    figures = {key: float(value) for key, value in _mean(recent).items()}
                    if self.optimizers:
                        figures["lr"] = recipe.optim.lr * factor
                    progress.update(number + 1, figures, recipe.batch * accumulate)
                    if self.main:
                        self.journal.write(number + 1, **figures)
                    recent.clear()
                stop = self.state["stopped"] = self.validate(number + 1)
                if stop or (number + 1) % self.engine.checkpoint_every == 0 or number + 1 == self.length:
                    self.save()
                if stop:
                    break

    def one(self, number: int, batches: Any) -> dict[str, Tensor]:
        """One step of the optimizer; its loss terms."""
        accumulate = self.recipe.accumulate
        total: dict[str, Tensor] = {}
        self.step.train()
        for part in range(accumulate):
            micro = number * accumulate + part
            found = next(batches)
            if isinstance(found, OverflyError):
                raise found
            self.module.batch = self.prepare(found, micro)
            last = part == accumulate - 1 or not self.optimizers
            with nullcontext() if last else self.fabric.no_backward_sync(self.step):
                losses: Losses = self.step()
                self.check(losses, number, micro)
                if losses:
                    self.fabric.backward(torch.stack(list(losses.values())).sum() / accumulate)
            for key, value in losses.items():
                total[key] = total.get(key, torch.zeros((), device=value.device)) + value.detach().float() / accumulate
        move(self.fabric, self.step, self.wrapped, self.recipe.clip)
        self.recipe.method.after_step(self.nets, number)
        return total

    def prepare(self, batch: Batch, micro: int) -> Batch:
        """Move a batch to the device, seed this step's random choices, and augment the source."""
        seed = (self.recipe.seed * 1_000_003 + micro) * 1_009 + self.fabric.global_rank
        torch.manual_seed(2 * seed)
        generator = torch.Generator().manual_seed(2 * seed + 1)
        batch = self.fabric.to_device(batch)
        if batch.source.image.shape[0] and self.recipe.augment:
            max_value = self.recipe.domain("source").max_value
            source = augment(batch.source, self.recipe.augment, max_value=max_value, generator=generator)
            batch = batch._replace(source=Labeled(*source))
        return batch

    def check(self, losses: Losses, number: int, micro: int) -> None:
        """Stop where a loss is not finite, before it reaches the weights."""
        if not losses:
            return
        finite = bool(torch.stack([value.detach() for value in losses.values()]).isfinite().all())
        terms = ", ".join(f"{key} = {value.item()}" for key, value in losses.items()) if not finite else ""
        if self.fabric.world_size > 1:
            bad = float(torch.as_tensor(self.fabric.all_reduce(torch.tensor(float(not finite)), reduce_op="sum")))
            if not bad:
                return
            found: list[Any] = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(found, (terms, self.steps.names(micro)))
            terms, pictures = next(entry for entry in found if entry[0])
        elif finite:
            return
        else:
            pictures = self.steps.names(micro)
        names = ", ".join(pictures)
        if self.main:
            self.journal.write(number, event="not finite", terms=terms, items=names)
        raise TrainingError(
            f"the loss is not finite at step {number} ({terms}; pictures: {names}); lower optim.lr or set clip, or "
            f"look at these pictures with `overfly data check`; the last good checkpoint is kept: {self._kept()}"
        )

    def _kept(self) -> str:
        return str(self.run.checkpoint) if self.run.checkpoint.exists() else "none yet"

    def check_weights(self) -> None:
        """Refuse to keep weights that are not finite: a finite loss may still have had a gradient that was not."""
        for name, value in self.nets.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise TrainingError(
                    f"{name} is not finite after step {self.state['step']}; lower optim.lr or set clip; the last good "
                    f"checkpoint is kept: {self._kept()}"
                )

    def validate(self, number: int) -> bool:
        """Look at source and target when it is time; whether training should stop."""
        rule = self.recipe.validation
        if not rule.every or (number % rule.every and number != self.length):
            return False
        self.check_weights()
        found = self.watch.source(min(self.engine.workers, 1)) if self.recipe.source else None
        if self.main:
            self.journal.write(number, event="validation", source_miou=found)
        if rule.target:
            figures = self.watch.target(found)
            if self.main and figures is not None:
                self.journal.write(number, event="label-free", **journalled(figures))
        if rule.keep_all:
            self.keep(self.run.weights_at(number))
        return self.chosen(number, found or 0.0) if self.recipe.source else False

    def chosen(self, number: int, value: float) -> bool:
        """Keep the best by the source's held-out labels; whether there was no better one for too long."""
        rule = self.recipe.validation
        if self.state["best"] is None or value > self.state["best"]:
            self.state |= {"best": value, "best_step": number, "stale": 0}
            if rule.select == "best":
                self.keep(self.run.weights)
        else:
            self.state["stale"] += 1
        return bool(rule.patience and self.state["stale"] >= rule.patience)

    def keep(self, path: Path) -> None:
        """Write the network as it stands."""
        network = self.recipe.method.deployed(self.nets)
        if self.main and isinstance(network, Segmenter):
            network.save(path)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        self.check_weights()
        self.state["took_s"] = self.took()
        if self.main:
            save_state(self.run.checkpoint, self.state, self.nets, self.optimizers, self.fabric)
        self.fabric.barrier()

    def end(self) -> None:
        """Keep the last weights unless a better validation was kept, and write down that the run is whole."""
        rule = self.recipe.validation
        if not rule.every or rule.select == "last" or not self.run.weights.exists():
            self.keep(self.run.weights)
        if self.main:
            finished = datetime.now(UTC).isoformat()
            self.run.record("machine.json", self.run.machine | {"took_s": round(self.took(), 1), "finished": finished})
        self.fabric.barrier()

    def took(self) -> float:
        """Seconds of training, those before an interruption counted in as far as a checkpoint knows of them."""
        now = time.monotonic()
        total = float(self.state["took_s"]) + now - self.began
        self.began = now
        self.state["took_s"] = total
        return total


def _mean(rows: list[dict[str, Tensor]]) -> Mapping[str, Tensor]:
    """Mean of each term over the steps that had it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: torch.stack([row[key] for row in rows if key in row]).mean() for key in keys}


__all__ = ["Prepared", "Training", "fit", "prepare"]
