"""Ctrl-C and SIGTERM write a checkpoint between two steps; a moved run, absent data and a wrong clock lose nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from overfly import cli, train
from overfly.core.errors import OverflyError
from overfly.core.records import Batch
from overfly.data.synthetic import write_synthetic
from overfly.recipe import Recipe, load
from overfly.training import run as runs
from overfly.training.run import Run
from overfly.training.trainer import Trainer


def recipe(folder: Path, *overrides: str) -> Recipe:
    if not (folder / "world").exists():
        write_synthetic(folder / "world", size=64, train=4, val=2, test=1)
    source = {"name": "loveda", "root": str(folder / "world"), "scene": "urban"}
    settings = {"source": source, "model": "small_network", "augment": ["dihedral"], "crop": 64, "batch": 2}
    return load(settings, "steps=6", *overrides)


def start(recipe: Recipe | Path, out: Path, **options: Any) -> Run:
    return train(recipe, out=out, device="cpu", quiet=True, checkpoint_every=1000, **options).run


def content(run: Run) -> dict[str, torch.Tensor]:
    return dict(run.segmenter().state_dict())


def checkpoint_step(run: Run) -> int:
    return int(torch.load(run.checkpoint, weights_only=True)["state"]["step"])


@pytest.fixture
def _sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, cli._terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_sigterm")
@pytest.mark.parametrize(
    ("place", "number", "step"),
    [("prepare_batch", signal.SIGINT, 3), ("prepare_batch", signal.SIGTERM, 3), ("validate", signal.SIGTERM, 4)],
)
def test_a_signal_writes_a_checkpoint_after_the_step(
    place: str, number: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(tmp_path, "validation.every=2")
    whole = content(start(settings, tmp_path / "whole"))
    original = getattr(Trainer, place)

    def interrupted(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.state["step"] == (2 if place == "prepare_batch" else 4):
            signal.raise_signal(number)
        return original(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, place, interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            start(settings, tmp_path / "out")
    assert isinstance(caught.value, cli.Terminated) == (number == signal.SIGTERM)
    run = Run.open(next((tmp_path / "out").iterdir()))
    assert checkpoint_step(run) == step
    assert signal.getsignal(signal.SIGTERM) is cli._terminate
    again = content(start(settings, tmp_path / "out"))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_second_signal_stops_within_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(trainer: Trainer, batch: Batch, index: int) -> Batch:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError(trainer, batch, index)

    monkeypatch.setattr(Trainer, "prepare_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(recipe(tmp_path), tmp_path / "out")


def test_absent_data_are_named_and_a_moved_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(tmp_path)
    whole = content(start(settings, tmp_path / "whole"))
    original = Trainer.prepare_batch

    def vanish(trainer: Trainer, batch: Batch, index: int) -> Batch:
        if index == 2:
            (tmp_path / "world").rename(tmp_path / "gone")
        return original(trainer, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "prepare_batch", vanish)
        with pytest.raises(OverflyError, match="world"):
            start(settings, tmp_path / "out", cache="off")
    run = Run.open(next((tmp_path / "out").iterdir()))
    assert 0 < checkpoint_step(run) < 6
    with pytest.raises(OverflyError, match="world"):
        start(settings, tmp_path / "out", cache="off")
    (tmp_path / "gone").rename(tmp_path / "world")
    moved = (tmp_path / "elsewhere").resolve() / run.path.name
    moved.parent.mkdir()
    run.path.rename(moved)
    again = content(start(moved, moved, cache="off"))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_clock_set_back_starts_no_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(tmp_path)
    first = start(settings, tmp_path / "out")

    class Past(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(1999, 12, 31, 23, 59, tzinfo=tz)

    monkeypatch.setattr(runs, "datetime", Past)
    monkeypatch.setattr(time, "time", lambda: 946_684_799.0)
    assert start(settings, tmp_path / "out").path == first.path
    other = start(load(settings, "seed=1"), tmp_path / "out")
    assert other.finished
    assert other.machine["took_s"] >= 0
    assert Run.find(tmp_path / "out", settings) is not None
