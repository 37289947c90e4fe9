"""Precision and memory format of training, chosen by timing steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overfly import train
from overfly.adaptation.auto_recipe import time_step
from overfly.core.download import cache_folder
from overfly.methods.method import Networks
from overfly.methods.source_only import SourceOnly
from overfly.models.checkpoints import weights_sha256
from overfly.recipe import Recipe, load
from overfly.training import engine
from overfly.training.engine import (
    ARITHMETICS,
    Arithmetic,
    TrainerConfig,
    choose_arithmetic,
    launch_fabric,
    time_arithmetics,
)
from overfly.training.run import Run

CPU = torch.device("cpu")
PLAIN, PLAIN_LAST, MIXED, MIXED_LAST = ARITHMETICS


@pytest.fixture
def automatic(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    monkeypatch.setenv("OVERFLY_CACHE", str(tmp_path / "cache"))
    return load(small, "precision=auto")


def set_times(monkeypatch: pytest.MonkeyPatch, *milliseconds: float) -> list[dict[str, Any]]:
    """Replace the measurement; returns the list of its calls."""
    calls: list[dict[str, Any]] = []

    def times(network: str, **shape: Any) -> dict[Arithmetic, float]:
        calls.append({"network": network, **shape})
        return {each: time / 1e3 for each, time in zip(ARITHMETICS, milliseconds, strict=False)}

    monkeypatch.setattr(engine, "time_arithmetics", times)
    return calls


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [
        ((100, 80, 70, 50), MIXED_LAST),
        ((100, 80, 900, 700), PLAIN_LAST),
        ((100, 97, 96, 96), PLAIN),  # no gain worth the difference
        ((100, 120), PLAIN),  # bf16 was far slower, and not timed
    ],
)
def test_the_fastest_arithmetic_is_chosen(
    automatic: Recipe, monkeypatch: pytest.MonkeyPatch, milliseconds: tuple[float, ...], chosen: Arithmetic
) -> None:
    set_times(monkeypatch, *milliseconds)
    assert choose_arithmetic(automatic, CPU) == chosen


def test_times_are_kept_for_machine_network_crop_and_batch(
    automatic: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = set_times(monkeypatch, 100, 80, 70, 50)
    assert [choose_arithmetic(load(automatic, f"seed={seed}"), CPU, quiet=False) for seed in (0, 1)] == [MIXED_LAST] * 2
    line = "precision: bf16, channels-last (a step on this machine: 32: 100 ms, 32 channels-last: 80 ms, "
    assert capsys.readouterr().err.count(line) == 2
    assert len(calls) == 1
    choose_arithmetic(load(automatic, "crop=40"), CPU)
    choose_arithmetic(load(automatic, "batch=3"), CPU)
    assert [(call["size"], call["batch"]) for call in calls[1:]] == [(40, automatic.batch), (automatic.crop, 3)]
    for file in (cache_folder() / "training").iterdir():
        file.write_text(file.read_text().replace("0.1", "0.01"))
    assert choose_arithmetic(automatic, CPU) == MIXED_LAST
    assert len(calls) == 4


def test_a_named_precision_is_not_timed(automatic: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = set_times(monkeypatch, 100, 80, 70, 50)
    assert choose_arithmetic(load(automatic, "precision=32"), CPU) == PLAIN
    assert choose_arithmetic(automatic, CPU, processes=2) == PLAIN
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert choose_arithmetic(load(automatic, "precision=bf16"), CPU) == PLAIN_LAST
    assert not calls


def test_all_candidates_are_timed() -> None:
    seconds = time_arithmetics("lraspp_mobilenet_v2", classes=3, bands=4, size=64, batch=2, device=CPU)
    assert set() < set(seconds) <= set(ARITHMETICS)  # far slower ones are left out
    assert min(seconds.values()) > 0


def test_a_budget_is_fitted_in_the_chosen_precision(automatic: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, 100, 80, 70, 50)
    cast: set[bool] = set()

    def losses(self: SourceOnly, nets: Networks, batch: Any) -> Any:
        logits = nets.student(batch.source.image)
        cast.add(torch.is_autocast_enabled("cpu"))
        return self.supervised(logits, batch.source.label)

    monkeypatch.setattr(SourceOnly, "losses", losses)
    assert time_step(automatic, launch_fabric(automatic, TrainerConfig("cpu"))) > 0
    assert cast == {True}


class Interrupted(SourceOnly, name="interrupted"):
    """Source-only training that is interrupted once after two steps."""

    def after_step(self, nets: Networks, step: int) -> None:
        super().after_step(nets, step)
        if step == 2 and not INTERRUPTED:
            INTERRUPTED.append(step)
            raise KeyboardInterrupt


INTERRUPTED: list[int] = []


def test_a_resumed_run_keeps_its_arithmetic(automatic: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load(automatic, "method=interrupted", "steps=4")
    set_times(monkeypatch, 100, 50, 70, 60)
    INTERRUPTED.clear()
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=tmp_path / "cut", device="cpu", checkpoint_every=1, quiet=True)
    whole = train(recipe, out=tmp_path / "whole", device="cpu", quiet=True).run
    for file in (cache_folder() / "training").iterdir():
        file.unlink()
    set_times(monkeypatch, 100, 80, 70, 50)
    cut = train(recipe, out=tmp_path / "cut", device="cpu", quiet=True).run
    assert len(list((tmp_path / "cut").glob("*/recipe.yaml"))) == 1
    for run in (cut, whole):
        assert (run.machine["precision"], run.machine["channels_last"]) == PLAIN_LAST
    assert weights_sha256(cut.weights) == weights_sha256(whole.weights)
    other = train(load(recipe, "seed=1"), out=tmp_path / "cut", device="cpu", quiet=True).run
    assert (other.machine["precision"], other.machine["channels_last"]) == MIXED_LAST


def test_a_run_without_memory_format_is_resumed_as_before(automatic: Recipe, tmp_path: Path) -> None:
    recipe = load(automatic, "precision=bf16")
    run = Run.open_or_create(tmp_path / "runs", recipe)
    run.write_json("machine.json", run.machine | {"precision": "32"})  # a CPU without bf16
    assert train(recipe, out=tmp_path / "runs", device="cpu", quiet=True).run.machine["precision"] == "32"
    assert run.machine["channels_last"]
