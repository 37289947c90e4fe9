"""The training loop and its checkpoint of networks, optimizers, loss scale and step."""

import os
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from overfly.core.atomic_files import append_digest, atomic_write
from overfly.core.device import SAMENESS, describe_machine
from overfly.core.errors import OverflyError, RecipeError, RunError, TrainingError
from overfly.core.optimizers import set_learning_rate
from overfly.core.prefetch import prefetch
from overfly.core.progress import Progress, print_status
from overfly.core.records import Batch, Labeled, Losses
from overfly.data.loading import batch_loader
from overfly.models.segmenter import Segmenter
from overfly.ops.augmentation import augment
from overfly.ops.normalization import estimate_statistics
from overfly.training import engine
from overfly.training.engine import Arithmetic, TrainerConfig
from overfly.training.evaluate import Evaluator, log_entry
from overfly.training.run import Run, RunLog, utc_now
from overfly.training.setup import STATISTICS_BATCHES, TrainingSetup, source_images

if TYPE_CHECKING:
    from lightning_fabric import Fabric

READ_AHEAD = 2
"""Batches that a thread reads ahead of the steps where no processes do."""
UNREADABLE = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, pickle.UnpicklingError,
)  # fmt: skip
"""Errors of loading a damaged checkpoint, or one of another program."""


class Trainer:
    """The state of one run during training.

    ``step`` is the number of finished optimizer steps, ``index`` the index of the current step from 0, and
    ``batch_index`` the index of a batch; a step has ``accumulate`` batches.
    """

    def __init__(
        self, run: Run, fabric: "Fabric", config: TrainerConfig, setup: TrainingSetup, arithmetic: Arithmetic
    ) -> None:
        self.run, self.fabric, self.config, self.recipe, self.arithmetic = run, fabric, config, run.recipe, arithmetic
        self.batches, self.nets, self.total_steps = setup.batches, setup.nets, setup.total_steps
        self.state: dict[str, Any] = {
            "step": 0, "validated": 0, "best": None, "best_step": 0, "stale": 0, "stopped": False, "took_s": 0.0,
        }  # fmt: skip
        self.optimizers, self.initial_weights = setup.optimizers, setup.initial_weights
        last = arithmetic.channels_last
        engine.apply_performance_settings(self.nets, self.optimizers, channels_last=last, device=fabric.device)
        self.losses = engine.LossModule(self.recipe.method, self.nets)
        parts: Any = (self.losses, *self.optimizers)
        wrapped: Any = fabric.setup(*parts) if self.optimizers else map(fabric.to_device, parts)
        self.wrapped, *self.wrapped_optimizers = wrapped
        self.is_rank_zero = fabric.is_global_zero
        tensorboard = run.path / "tensorboard" if config.tensorboard and self.is_rank_zero else None
        self.log = RunLog(run.log.path, tensorboard)
        self.recent: list[dict[str, Tensor]] = []
        """Loss terms of the steps since the last log line, on the device."""
        self.evaluator = Evaluator(self.recipe, self.nets, fabric)
        self.between_steps = True
        self.resumed_from: Path | None = None
        self.started = time.monotonic()

    def resume(self) -> None:
        """Load the last checkpoint if it exists, and write machine.json."""
        self.resumed_from = engine.run_on_rank_zero(self.fabric, self.run.whole_checkpoint)
        if self.resumed_from is not None:
            self.load_checkpoint(self.resumed_from)
            if self.state.get("processes", self.fabric.world_size) != self.fabric.world_size:
                raise RecipeError(
                    f"{self.run.path} was started with --devices {self.state['processes']}, got "
                    f"{self.fabric.world_size}, which gives other weights; use the same number, or delete the folder"
                )
        self.state["processes"] = self.fabric.world_size
        if self.is_rank_zero:
            self.log.rewind(self.state["step"])
            before = self.run.machine
            machine = {"started": utc_now()} | before | describe_machine(self.fabric.device)
            machine |= {"overfly": version("overfly"), "argv": sys.argv}
            machine |= {"processes": self.fabric.world_size, "finished": None}
            changed = [key for key in SAMENESS if before.get(key, machine[key]) != machine[key]]
            if changed and self.resumed_from:
                text = ", ".join(f"{key} {machine[key]} instead of {before[key]}" for key in changed)
                print_status(f"resumed with {text}; weights may differ from an uninterrupted run's in the last digits")
                self.log.write(self.state["step"], event="machine changed", changes=text)
            machine.setdefault("initial_weights", self.initial_weights)
            machine |= self.arithmetic._asdict()
            self.run.write_json("machine.json", machine)
        self.fabric.barrier()

    def train(self) -> None:
        """Take all remaining optimizer steps, with logging, validation and checkpoints."""
        if self.state["stopped"]:
            return
        first_step, accumulate = self.state["step"], self.recipe.accumulate
        quiet = self.config.quiet or not self.is_rank_zero
        resumed = f", resumed after step {first_step}" if first_step else ""
        print_status(f"training {self.run.path.name}: {self.total_steps} steps{resumed}", quiet=quiet)
        if first_step > self.state["validated"] and self.validate(first_step):
            return
        self.first_step, self.loop_started = first_step, time.monotonic()
        loader = batch_loader(
            self.batches, first_step * accumulate, self.total_steps * accumulate,
            workers=self.config.workers, pin=self.fabric.device.type == "cuda",
        )  # fmt: skip
        ahead: AbstractContextManager[Iterator[Batch | OverflyError]] = (
            nullcontext(iter(loader)) if self.config.workers else prefetch(loader, READ_AHEAD)
        )
        with (
            Progress("steps", quiet=quiet) as progress,
            ahead as batches,
            engine.delayed_signals(partial(getattr, self, "between_steps")) as raise_delayed,
        ):
            progress.update("training", first_step, self.total_steps)
            for index in range(first_step, self.total_steps):
                set_learning_rate(self.optimizers, self.recipe.schedule.factor(index, self.total_steps))
                try:
                    self.recent.append(self.train_step(index, batches))
                    step = self.state["step"] = index + 1
                    self.between_steps = True
                    raise_delayed()
                    if step % self.config.log_every == 0 or step == self.total_steps:
                        self.write_log(step, progress)
                    stop = self.validate(step)
                except (OverflyError, KeyboardInterrupt):
                    if self.between_steps and self.non_finite_loss() is None and self.non_finite_weight() is None:
                        self.write_checkpoint()  # after an error between two steps, such as a damaged mask
                    raise
                except (RuntimeError, ValueError):
                    if (report := self.non_finite_loss()) is not None:  # it is the cause
                        self.raise_not_finite(*report)
                    raise
                if stop or step % self.config.checkpoint_every == 0 or step == self.total_steps:
                    self.save()
                if stop:
                    break

    def train_step(self, index: int, batches: Iterator[Batch | OverflyError]) -> dict[str, Tensor]:
        """Take one optimizer step and return its loss terms, averaged over its batches, on the device."""
        accumulate = self.recipe.accumulate
        total: dict[str, Tensor] = {}
        self.wrapped.train()
        for part in range(accumulate):
            batch_index = index * accumulate + part
            batch = next(batches)
            if isinstance(batch, OverflyError):
                raise batch
            self.between_steps = False
            self.losses.batch = self.prepare_batch(batch, batch_index)
            last = part == accumulate - 1 or not self.optimizers
            with nullcontext() if last else self.fabric.no_backward_sync(self.wrapped):
                losses: Losses = self.wrapped()
                if losses:
                    self.fabric.backward(torch.stack(list(losses.values())).sum() / accumulate)
            for key, value in losses.items():
                total[key] = total.get(key, torch.zeros((), device=value.device)) + value.detach().float() / accumulate
        engine.optimizer_step(self.fabric, self.wrapped, self.wrapped_optimizers, self.recipe.clip)
        self.recipe.method.after_step(self.nets, index)
        return total

    def prepare_batch(self, batch: Batch, batch_index: int) -> Batch:
        """Move a batch to the device, seed random numbers for it, and augment the source."""
        seed = (self.recipe.seed * 1_000_003 + batch_index) * 1_009 + self.fabric.global_rank
        torch.manual_seed(2 * seed)
        generator = torch.Generator().manual_seed(2 * seed + 1)
        batch = self.fabric.to_device(batch)
        if batch.source.image.shape[0] and self.recipe.augment:
            max_value = self.recipe.domain("source").max_value
            source = augment(batch.source, self.recipe.augment, max_value=max_value, generator=generator)
            batch = batch._replace(source=Labeled(*source))
        return batch

    def write_log(self, step: int, progress: Progress) -> None:
        """Append the mean losses since the last line; this synchronizes with the GPU."""
        self.check_losses()
        keys = dict.fromkeys(key for row in self.recent for key in row)
        means = {key: torch.stack([row[key] for row in self.recent if key in row]).mean() for key in keys}
        values = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True)) if means else {}
        if self.optimizers:
            values["lr"] = self.recipe.optim.lr * self.recipe.schedule.factor(step - 1, self.total_steps)
        if self.is_rank_zero:
            self.log.write(step, **values)
        images = (step - self.first_step) * self.recipe.batch * self.recipe.accumulate
        rate = images / (time.monotonic() - self.loop_started)
        losses = "  ".join(f"{key} {value:.3g}" for key, value in values.items())
        progress.update("training", step, self.total_steps, f"{losses}  {rate:.1f} images/s")
        self.recent.clear()

    def check_losses(self) -> None:
        """Raise TrainingError if a loss since the last line of the log is not finite in any process."""
        report = self.non_finite_loss()
        if engine.any_rank(self.fabric, report is not None):
            reports = [report]
            if self.fabric.world_size > 1:
                reports = [None] * self.fabric.world_size
                torch.distributed.all_gather_object(reports, report)
            self.raise_not_finite(*min(entry for entry in reports if entry is not None))

    def non_finite_loss(self) -> tuple[int, str, str] | None:
        """Return step, loss terms and images of the first step since the last log line with a non-finite loss."""
        finite = [torch.stack(list(row.values())).isfinite().all() for row in self.recent if row]
        if not finite or bool(torch.stack(finite).all()):
            return None
        offset = next(n for n, row in enumerate(self.recent) if not all(value.isfinite() for value in row.values()))
        terms = ", ".join(f"{key} = {value.item()}" for key, value in self.recent[offset].items())
        index = self.state["step"] - len(self.recent) + offset
        accumulate = self.recipe.accumulate
        names = [name for part in range(accumulate) for name in self.batches.names(index * accumulate + part)]
        return index + 1, terms, ", ".join(names)

    def raise_not_finite(self, step: int, terms: str, images: str) -> NoReturn:
        """Log a non-finite loss and raise TrainingError."""
        if self.is_rank_zero:
            self.log.write(step, event="not finite", terms=terms, items=images)
        first_step, last = self.state["step"] - len(self.recent) + 1, self.state["step"]
        raise TrainingError(
            f"the loss is not finite at step {step} ({terms}; images: {images}; checked steps {first_step} to {last}); "
            "lower optim.lr or set clip, or check these images with `overfly data check`; last good checkpoint: "
            f"{self.last_checkpoint}"
        )

    @property
    def last_checkpoint(self) -> str:
        """Path of the checkpoint for messages."""
        return str(self.run.checkpoint) if self.run.checkpoint.exists() else "none"

    def check_weights(self) -> None:
        """Raise TrainingError if a weight is not finite, as after an infinite gradient of a finite loss."""
        name = self.non_finite_weight()
        if engine.any_rank(self.fabric, name is not None):
            raise TrainingError(
                f"{name or 'a weight in another process'} is not finite after step {self.state['step']}; lower "
                f"optim.lr or set clip; last good checkpoint: {self.last_checkpoint}"
            )

    def non_finite_weight(self) -> str | None:
        """Return the name of the first non-finite weight or buffer, or None."""
        tensors = {name: value for name, value in self.nets.state_dict().items() if value.is_floating_point()}
        finite = [value.isfinite().all() for value in tensors.values()]
        if not finite or bool(torch.stack(finite).all()):
            return None
        return next(name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite)

    def validate(self, step: int) -> bool:
        """Validate on source and target if due at this step; return whether training should stop."""
        rule = self.recipe.validation
        stop = False
        if rule.every and (step % rule.every == 0 or step == self.total_steps):
            self.check_losses()
            self.check_weights()
            miou = self.evaluator.source_miou(min(self.config.workers, 1)) if self.recipe.source else None
            if self.is_rank_zero:
                self.log.write(step, event="validation", source_miou=miou)
            if rule.target:
                metrics = self.evaluator.target_metrics(miou)
                if self.is_rank_zero and metrics is not None:
                    self.log.write(step, event="label-free", **log_entry(metrics))
            if rule.keep_all:
                self.save_weights(self.run.weights_at(step))
            stop = self.select(step, miou or 0.0) if self.recipe.source else False
        self.state |= {"validated": step, "stopped": stop}
        return stop

    def select(self, step: int, miou: float) -> bool:
        """Save weights of a new best source mIoU; return whether ``patience`` validations did not improve it."""
        rule = self.recipe.validation
        if self.state["best"] is None or miou > self.state["best"]:
            self.state |= {"best": miou, "best_step": step, "stale": 0}
            if rule.select == "best":
                self.save_weights(self.run.weights)
        else:
            self.state["stale"] += 1
        return bool(rule.patience and self.state["stale"] >= rule.patience)

    def save_weights(self, path: Path) -> None:
        """Save the inference network."""
        network = self.recipe.method.inference_network(self.nets)
        if self.is_rank_zero and isinstance(network, Segmenter):
            network.save(path)

    def save(self) -> None:
        """Write the checkpoint."""
        self.check_losses()
        self.check_weights()
        self.write_checkpoint()
        self.fabric.barrier()

    def write_checkpoint(self) -> None:
        """Write the checkpoint atomically in the first process; raise `RunError` if that fails."""
        self.add_elapsed_time()
        if not self.is_rank_zero:
            return
        path = self.run.checkpoint
        checkpoint = {
            "state": self.state,
            "nets": self.nets.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "precision": self.fabric.strategy.precision.state_dict(),  # the loss scale of precision 16
        }
        path.parent.mkdir(exist_ok=True)
        try:
            with atomic_write(path) as part:
                with part.open("w+b") as file:
                    torch.save(checkpoint, file)
                    append_digest(file)
                    file.flush()
                    os.fsync(file.fileno())
                if path.exists() and self.resumed_from != self.run.previous_checkpoint:  # else it is damaged
                    path.replace(self.run.previous_checkpoint)
            self.resumed_from = path
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise RunError(f"{path} cannot be written ({reason}); free space; the last checkpoint is kept") from None

    def load_checkpoint(self, path: Path) -> None:
        """Load state, networks, optimizers and precision; raise `RunError` if the file does not fit."""
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            self.nets.load_state_dict(checkpoint["nets"])
            for optimizer, saved in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            if checkpoint["precision"]:
                self.fabric.strategy.precision.load_state_dict(checkpoint["precision"])
            self.state |= checkpoint["state"]
        except UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"{path} cannot be resumed from ({reason}); delete it to train from the start") from None

    def finish(self) -> None:
        """Save the final weights unless a validation selected better ones, and mark the run as finished."""
        rule = self.recipe.validation
        if not rule.every or rule.select == "last" or not self.run.weights.exists():
            self.save_weights(self.run.weights)
        if self.is_rank_zero:
            if self.recipe.method.source_statistics:
                self.estimate_statistics()
            self.add_elapsed_time()
            took_s = round(self.state["took_s"], 1)
            self.run.write_json("machine.json", self.run.machine | {"took_s": took_s, "finished": utc_now()})
            self.run.previous_checkpoint.unlink(missing_ok=True)
        self.fabric.barrier()

    def estimate_statistics(self) -> None:
        """Estimate the final weights' batch-normalization statistics on source images without augmentation."""
        segmenter = Segmenter.load(self.run.weights).to(self.fabric.device)
        count = min(STATISTICS_BATCHES, self.total_steps)
        images = (image.to(self.fabric.device) for image in source_images(self.batches.source, count))
        estimate_statistics(segmenter, images)
        segmenter.save(self.run.weights)

    def add_elapsed_time(self) -> None:
        """Add the time since the last call to the training time, which is stored in checkpoints."""
        now = time.monotonic()
        self.state["took_s"] += now - self.started
        self.started = now
