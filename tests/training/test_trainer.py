from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import processes
from overfly import train
from overfly.core.atomic_files import file_sha256
from overfly.core.errors import DataError, RecipeError, RunError, TrainingError
from overfly.core.optimizers import SGD, Adam, AdamW, Optim
from overfly.core.records import Batch, Losses
from overfly.data.loading import BatchDataset
from overfly.methods.method import Method, Networks
from overfly.methods.source_only import SourceOnly
from overfly.models.network import build
from overfly.recipe import Recipe, load
from overfly.training import evaluate
from overfly.training.engine import (
    Arithmetic,
    TrainerConfig,
    apply_performance_settings,
    launch_fabric,
    named_arithmetic,
)
from overfly.training.run import Run
from overfly.training.setup import initial_network, prepare_training, training_streams
from overfly.training.trainer import Trainer


def weights(run: Run) -> dict[str, Tensor]:
    return load_file(run.weights)


def equal(left: Run, right: Run) -> bool:
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def trained(recipe: Recipe, out: Path, **settings: Any) -> Run:
    return train(recipe, out=out, device="cpu", quiet=True, **settings).run


class StopsAt(SourceOnly, name="stops"):
    """Source-only training that raises KeyboardInterrupt once."""

    at: int = 2
    """The step."""

    def after_step(self, nets: Networks, step: int) -> None:
        del nets
        if step == self.at and not STOPPED:
            STOPPED.append(step)
            raise KeyboardInterrupt


STOPPED: list[int] = []


@pytest.mark.parametrize("at", [0, 1, 3])
def test_resumed_run_equals_uninterrupted_run(small: dict[str, Any], tmp_path: Path, at: int) -> None:
    recipe = load(
        small, f"method={{name: stops, at: {at}}}", "steps=5", "optim=adamw", "validation.every=2", "accumulate=2",
        "augment=[dihedral, scale_jitter, color_jitter, gaussian_noise]", "clip=1.0",
    )  # fmt: skip
    STOPPED.clear()
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "cut", checkpoint_every=2, log_every=1)
    cut = trained(recipe, tmp_path / "cut", checkpoint_every=2, log_every=1)
    whole = trained(recipe, tmp_path / "whole", checkpoint_every=100, log_every=1)
    assert equal(cut, whole)
    rows = [[row for row in run.log.rows() if "event" not in row] for run in (cut, whole)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_resumed_run_equals_uninterrupted_run(small: dict[str, Any], tmp_path: Path, world: int) -> None:
    load(small, "steps=40", "batch=4", "augment=[dihedral]").save(tmp_path / "recipe.yaml")
    command = ("train", tmp_path / "recipe.yaml", "--checkpoint-every", "2", "--log-every", "1")
    started, deadline = processes.start(*command, out=tmp_path / "cut", world=world), time.monotonic() + 300
    lines = 0
    while lines < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
        lines = sum(len(log.read_text().splitlines()) for log in (tmp_path / "cut").glob("*/log.jsonl"))
    for process in started:
        process.kill()
    for process in started:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    processes.run(*command, out=tmp_path / "cut", world=world)
    processes.run(*command[:2], out=tmp_path / "whole", world=world)
    runs = [[Run.open(file.parent) for file in (tmp_path / out).glob("*/recipe.yaml")] for out in ("cut", "whole")]
    assert [len(each) for each in runs] == [1, 1]
    assert equal(runs[0][0], runs[1][0])


class NonFiniteLoss(SourceOnly, name="poisoned"):
    """Source-only training with a loss that is not finite at a step."""

    at: int = 3
    """The step."""

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        terms = dict(super().losses(nets, batch))
        STEPS.append(1)
        if len(STEPS) == self.at + 1:
            terms["extra"] = terms["main"] * float("nan")
        return terms


STEPS: list[int] = []


def test_loss_that_is_not_finite_raises_and_keeps_the_last_checkpoint(small: dict[str, Any], tmp_path: Path) -> None:
    STEPS.clear()
    recipe = load(small, "method=poisoned", "steps=6")
    with pytest.raises(TrainingError, match=r"step 4 .*extra = nan.*1 to 4") as caught:
        trained(recipe, tmp_path, checkpoint_every=2)
    run = Run.open(next(tmp_path.glob("*/recipe.yaml")).parent)
    assert str(run.checkpoint) in str(caught.value)
    assert torch.load(run.checkpoint, weights_only=True)["state"]["step"] == 2
    assert not run.finished
    names = str(caught.value).split("images: ")[1].split(";")[0].split(", ")
    assert len(names) == 2
    assert any(row.get("event") == "not finite" and row["items"] == ", ".join(names) for row in run.log.rows())


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the values that Python reads from tensors; each makes a GPU wait."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


class Squares(SourceOnly, name="squares"):
    """A loss that reads no value of a tensor."""

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        return {"main": nets.student(batch.source.image).main.square().mean()}


def test_step_without_log_line_reads_no_tensor_value(small: dict[str, Any], tmp_path: Path) -> None:
    recipe, config = load(small, "method=squares", "accumulate=2", "clip=1.0"), TrainerConfig("cpu", quiet=True)
    fabric = launch_fabric(recipe, config)
    setup = prepare_training(recipe, fabric, config)
    trainer = Trainer(Run.open_or_create(tmp_path, recipe), fabric, config, setup, Arithmetic("32", False))
    batches = iter([trainer.batches[index] for index in range(4)])
    with HostReads() as reads:  # type: ignore[no-untyped-call]
        for index in range(2):
            trainer.recent.append(trainer.train_step(index, batches))
    assert reads.count == 0
    with HostReads() as reads:  # type: ignore[no-untyped-call]
        trainer.check_losses()
    assert reads.count > 0


def test_error_between_two_steps_saves_the_finished_steps(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(small, "validation.every=2", "steps=4")

    def broken(*_: Any, **__: Any) -> None:
        raise DataError("mask.png")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "score", broken)
        with pytest.raises(DataError, match=r"mask\.png"):
            trained(recipe, tmp_path / "cut")
    run = Run.open(next((tmp_path / "cut").iterdir()))
    assert torch.load(run.checkpoint, weights_only=True)["state"]["step"] == 2
    whole = trained(recipe, tmp_path / "whole")
    assert equal(trained(recipe, tmp_path / "cut"), whole)
    rows = [[row for row in run.log.rows() if row.get("event") == "validation"] for run in (run, whole)]
    assert rows[0] == rows[1]


def test_masks_of_a_later_validation_are_checked_before_the_first_step(small: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (number, 9, 90)).save(tmp_path / "images" / f"{number}.png")
        Image.new("L", (64, 64), 7 if number == 3 else number % 2).save(tmp_path / "masks" / f"{number}.png")
    source = {"name": "folder", "root": str(tmp_path), "classes": ["a", "b"], "masks": "masks",
              "splits": {"train": ["0", "1"], "val": ["2", "3"]}}  # fmt: skip
    recipe = load({**small, "source": source, "target": None}, "validation.every=2")
    with pytest.raises(DataError, match=r"masks/3\.png"):
        trained(recipe, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_changed_start_weights_make_a_new_run(small: dict[str, Any], tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    recipe = load(small, "method=recalibrate", f"start={start}", "steps=2")
    networks = [initial_network(load(small))[0].save(tmp_path / f"{number}.safetensors") for number in range(2)]
    runs = []
    for network in (*networks, networks[0]):
        shutil.copy(network, start)
        runs.append(trained(recipe, tmp_path / "runs"))
    assert runs[0].path != runs[1].path
    assert runs[2].path == runs[0].path
    assert not equal(runs[0], runs[1])
    assert [run.machine["start_sha256"] for run in runs] == [file_sha256(networks[number]) for number in (0, 1, 0)]
    assert "random" not in {run.machine["initial_weights"] for run in runs}
    shutil.copy(networks[1], start)
    with pytest.raises(RunError, match="start"):
        trained(recipe, runs[0].path)


def test_finished_run_is_reused_and_never_overwritten_by_another_recipe(recipe: Recipe, tmp_path: Path) -> None:
    first = trained(recipe, tmp_path)
    stamp = first.weights.stat().st_mtime_ns
    assert trained(recipe, tmp_path).path == first.path
    assert first.weights.stat().st_mtime_ns == stamp
    assert trained(recipe, first.path).path == first.path
    other = load(recipe, "seed=1")
    with pytest.raises(RunError, match="recipe"):
        trained(other, first.path)
    assert trained(other, tmp_path).path != first.path


def test_recipe_in_the_run_folder_reproduces_the_run(recipe: Recipe, tmp_path: Path) -> None:
    first = trained(recipe, tmp_path / "a")
    second = train(first.path / "recipe.yaml", out=tmp_path / "b", device="cpu", quiet=True).run
    assert equal(first, second)


def test_best_by_source_validation_and_early_stop(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(small, "validation.every=1", "validation.patience=2", "optim.lr=1e-9", "steps=20")
    run = trained(recipe, tmp_path, log_every=1)
    rows = [row for row in run.log.rows() if row.get("event") == "validation"]
    assert 3 <= len(rows) < 20
    values = [row["source_miou"] for row in rows]
    assert max(values[:-2]) >= max(values[-2:])
    assert run.finished
    assert "target" not in json.dumps(rows)


def test_missing_data_creates_no_folder(small: dict[str, Any], tmp_path: Path) -> None:
    small["source"] = {"name": "loveda", "root": str(tmp_path / "nowhere"), "scene": "urban"}
    with pytest.raises(Exception, match="nowhere"):
        trained(load(small), tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*"))


def test_locked_run_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    with run.lock(), pytest.raises(RunError, match=run.path.name):
        trained(recipe, tmp_path)


def test_damaged_checkpoint_raises_run_error(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    run.checkpoint.parent.mkdir()
    run.checkpoint.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(RunError, match=r"last\.ckpt"):
        trained(recipe, tmp_path)


def test_batch_must_be_a_multiple_of_the_devices(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"batch .* 3 .*2"):
        train(recipe, out=tmp_path, devices=3, device="cpu")
    with pytest.raises(RecipeError, match=r"batch .*4.*2"):
        train(recipe, out=tmp_path, devices=2, device="cpu")


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_trains(small: dict[str, Any], tmp_path: Path, precision: str) -> None:
    run = trained(load(small, f"precision={precision}"), tmp_path)
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_cpu_without_bf16_kernels_computes_in_32_bits(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert named_arithmetic("32", cpu) == ("32", False)
    assert named_arithmetic("bf16", torch.device("cuda")) == ("bf16", True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert named_arithmetic("bf16", cpu) == ("32", True)
    run = trained(load(small, "precision=bf16"), tmp_path)
    assert run.machine["precision"] == "32"
    assert run.machine["initial_weights"] == "random"


def test_channels_last_does_not_change_predictions() -> None:
    network = build("pidnet_s", 7).eval().double()
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    before = network(image).main
    apply_performance_settings(network, [], channels_last=True, device=torch.device("cpu"))
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in network.parameters() if w.dim() == 4)
    torch.testing.assert_close(network(image).main, before)


@pytest.mark.parametrize("optim", [SGD(lr=0.1), Adam(lr=0.01), AdamW(lr=0.01)])
def test_fused_optimizer_takes_the_same_steps(optim: Optim) -> None:
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        optimizer = optim.optimizer(net)
        if fused:
            apply_performance_settings(net, [optimizer], channels_last=False, device=torch.device("cpu"))
        for _ in range(5):
            net(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(net.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])


SECOND_BATCH_READ = threading.Event()


class WaitsForSecondBatch(SourceOnly, name="waits_for_second_batch"):
    """The first step ends when the second batch was read, which a loader between the steps never does."""

    def losses(self, nets: Networks, batch: Batch) -> Losses:
        assert SECOND_BATCH_READ.wait(60)
        return super().losses(nets, batch)


def test_batches_are_read_ahead_of_the_steps(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = BatchDataset.__getitem__

    def reading(self: BatchDataset, step: int) -> Any:
        if step == 1:
            SECOND_BATCH_READ.set()
        return read(self, step)

    SECOND_BATCH_READ.clear()
    monkeypatch.setattr(BatchDataset, "__getitem__", reading)
    run = trained(load(small, "method=waits_for_second_batch", "steps=3"), tmp_path / "waits")
    plain = trained(load(small, "steps=3"), tmp_path / "plain")
    assert equal(run, plain)


METHODS = [name for name, kind in Method.kinds.items() if kind.__module__.startswith("overfly.")]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_exactly(name: str, recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = recipe_of(name, steps=4)
    whole = trained(recipe, tmp_path / "whole")
    saves: list[int] = []
    original = Trainer.save

    def stop_after_two(self: Trainer) -> None:
        original(self)
        if self.state["step"] == 2 and self.recipe == recipe:
            saves.append(2)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe, tmp_path / "cut", checkpoint_every=2)
    assert saves == [2]
    assert equal(trained(recipe, tmp_path / "cut"), whole)
    expected = build(recipe.model.name, 7).state_dict().keys()
    assert {key.removeprefix("network.") for key in weights(whole)} - {"mean", "std"} == expected


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_weight_gets_a_gradient(
    name: str, recipe_of: Callable[..., Recipe], small: dict[str, Any]
) -> None:
    recipe = recipe_of(name, batch=4)
    source, target = training_streams(recipe)
    nets = recipe.method.networks(initial_network(load(small))[0])
    optimizers = recipe.method.optimizers(nets, recipe.optim)
    trainable = {id(parameter) for entry in optimizers for group in entry.param_groups for parameter in group["params"]}
    trains = {key: parameter for key, parameter in nets.named_parameters() if id(parameter) in trainable}
    losses = recipe.method.losses(nets.train(), BatchDataset(source, target).batch(0))
    assert bool(losses) == bool(trains) == recipe.method.trains
    if losses:
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
    assert not [key for key, parameter in trains.items() if parameter.grad is None or not parameter.grad.any()]


def test_worker_processes_do_not_change_the_weights(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(small, "augment=[dihedral]")
    assert equal(trained(recipe, tmp_path / "a"), trained(recipe, tmp_path / "b", workers=2))
