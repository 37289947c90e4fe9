from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overfly import adapt, train
from overfly.core.errors import RecipeError
from overfly.ops.normalization import batch_norms, reset_statistics, updating_statistics
from overfly.recipe import load
from overfly.training.run import Run
from overfly.training.setup import initial_network, training_streams


def test_statistics_are_the_plain_average_over_all_batches() -> None:
    norm = torch.nn.BatchNorm2d(3)
    batches = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(i)) * 2 + 1 for i in range(3)]
    reset_statistics(norm)
    with updating_statistics(norm):
        for batch in batches:
            norm(batch)
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variance = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, mean, atol=1e-6)
    assert torch.allclose(norm.running_var, variance, atol=1e-6)


def test_updating_statistics_disables_dropout_and_restores_modes() -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Dropout(0.5))
    with updating_statistics(module):
        assert module[0].training
        assert not module[1].training
    assert module.training
    assert module[1].training


def test_recalibrate_changes_statistics_only(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(
        {"start": small, "target": small["target"], "method": "recalibrate", "crop": 64, "batch": 2, "steps": 2}
    )
    run = train(recipe, out=tmp_path, device="cpu", quiet=True).run
    before = load_file(next(p for p in tmp_path.glob("*source_only*/checkpoints/best.safetensors")))
    after = load_file(run.weights)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.rsplit(".", 1)[1] in ("running_mean", "running_var", "num_batches_tracked") for key in changed)
    expected = initial_network(recipe, Run.find(tmp_path, recipe.start).weights)[0]  # type: ignore[arg-type,union-attr]
    reset_statistics(expected)
    _, target = training_streams(recipe)
    assert target is not None
    with updating_statistics(expected), torch.no_grad():
        for step in range(2):
            expected(target.read(step, [0, 1]).image)
    first = next(name for name, part in expected.named_modules() if part is batch_norms(expected)[0])
    assert torch.equal(after[f"{first}.running_mean"], expected.state_dict()[f"{first}.running_mean"])
    assert not any(key.startswith("source") for key in run.scores)


def test_target_items_carry_no_labels(small: dict[str, Any]) -> None:
    _, target = training_streams(load({"start": small, "target": small["target"], "method": "recalibrate", "crop": 64}))
    assert target is not None
    assert all(item.label is None for item in target.items)


def test_networks_without_batch_normalization_are_refused(small: dict[str, Any], tmp_path: Path) -> None:
    plain = {**small, "model": "small_group_norm"}
    with pytest.raises(RecipeError, match=r"recalibrate needs batch normalization, and small_group_norm has none"):
        train(load({**plain, "start": plain, "method": "recalibrate"}), out=tmp_path, device="cpu", quiet=True)
    assert not list(tmp_path.glob("*recalibrate*"))
    recipe = load({**plain, "start": plain, "method": {"name": "multiscale_self_training"}})
    found = adapt(recipe, out=tmp_path, device="cpu", quiet=True)
    assert list(found.selection.candidates) == ["source only", "adapted"]
