"""The rule of the teacher's moving average, and the confidence of its pseudo-labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overfly import train
from overfly.core.errors import RecipeError
from overfly.core.records import IGNORE, Batch
from overfly.data.loading import BatchDataset
from overfly.methods.dacs import DACS, GCWLDQ
from overfly.methods.method import Method, SelfTraining, TeacherStudent
from overfly.ops.pseudo_labels import PseudoLabels
from overfly.recipe import Recipe, load
from overfly.reporting.figures import training_curves
from overfly.training.engine import TrainerConfig
from overfly.training.setup import initial_network, prepare_training, training_streams

TEACHERS = sorted(name for name, kind in Method.kinds.items() if issubclass(kind, SelfTraining))


class Process:
    """What `prepare_training` asks of Fabric."""

    is_global_zero, global_rank, world_size = True, 0, 1

    def broadcast(self, value: Any) -> Any:
        return value


def moved(recipe: Recipe, start: Path | None) -> float:
    """How far the first step moves the teacher to the student: 1 makes it the student."""
    nets: Any = prepare_training(recipe, Process(), TrainerConfig(quiet=True), start).nets  # type: ignore[arg-type]
    weight, other = (next(network.parameters()) for network in (nets.teacher, nets.student))
    before = weight.clone()
    with torch.no_grad():
        other.add_(1)
    recipe.method.after_step(nets, 0)
    return float((weight - before).mean())


@pytest.mark.parametrize("name", TEACHERS)
def test_a_trained_start_stays_in_the_teacher(
    name: str, recipe_of: Callable[..., Recipe], small: dict[str, Any], tmp_path: Path
) -> None:
    start = initial_network(load(small))[0].save(tmp_path / "start.safetensors")
    recipe = recipe_of(name, start=str(start))
    assert isinstance(recipe.method, SelfTraining)
    assert moved(recipe, start) == pytest.approx(1 - recipe.method.ema, rel=1e-3)
    for warmup, expected in ((True, 1.0), (False, 1 - recipe.method.ema)):
        changed = recipe.model_copy(update={"method": recipe.method.model_copy(update={"ema_warmup": warmup})})
        assert moved(changed, start) == pytest.approx(expected, rel=1e-3)


def test_the_average_of_an_untrained_network_starts_as_a_plain_mean(recipe_of: Callable[..., Recipe]) -> None:
    for name in ("dacs", "dsbn", "mic"):
        assert moved(recipe_of(name), None) == pytest.approx(1)


def confident_share(method: Method[Any], recipe: Recipe, scores: Tensor) -> float:
    """The logged share of confident pixels, where the teacher's scores are those given."""
    nets = method.networks(initial_network(recipe)[0]).train()
    assert isinstance(nets, TeacherStudent)
    nets.teacher.register_forward_hook(lambda *given: given[2]._replace(main=scores))
    batch: Batch = BatchDataset(*training_streams(recipe)).batch(0)
    losses = method.losses(nets, batch)
    assert not losses["confident_share"].requires_grad  # logged, not minimized
    return float(losses["confident_share"])


def scores_with(*probabilities: float) -> Tensor:
    """Scores of 7 classes for a batch of 2 images of 64 pixels: class k fills a column with this probability."""
    rows = []
    for index, probability in enumerate(probabilities):
        row = torch.full((7,), (1 - probability) / 6)
        row[index] = probability
        rows.append(row.log())
    table = torch.stack(rows).repeat_interleave(64 // len(probabilities), 0)
    return table.T.view(1, 7, 1, 64).expand(2, 7, 64, 64)


def test_the_share_of_confident_pixels_is_logged(small: dict[str, Any]) -> None:
    recipe = load(small, "method=dacs")
    scores = scores_with(0.99, 0.9, 0.7, 0.5)
    for threshold, expected in ((0.968, 0.25), (0.8, 0.5), (0.6, 0.75)):
        for name in ("dacs", "mic", "daformer"):
            method = Method.kinds[name](confidence=threshold, **({} if name == "dacs" else {"warmup": 0}))
            assert confident_share(method, recipe, scores) == pytest.approx(expected)
    assert confident_share(GCWLDQ(), recipe, scores) == pytest.approx(0.75, abs=0.05)
    assert confident_share(GCWLDQ(confidence=0.95), recipe, scores) == pytest.approx(0.25, abs=0.05)
    assert confident_share(Method.kinds["cbst"](initial_share=0.5), recipe, scores) > 0.4


def test_the_log_and_its_curves_hold_the_share(small: dict[str, Any], tmp_path: Path) -> None:
    run = train(load(small, "method=dacs", "method.confidence=0"), out=tmp_path, device="cpu", quiet=True).run
    losses, _, metrics = training_curves(run.log.rows())
    assert [value for _, value in metrics["confident_share"]] == pytest.approx([1.0])
    assert "confident_share" not in losses


def test_classes_may_have_thresholds_of_their_own(small: dict[str, Any]) -> None:
    recipe = load(small, "method=dacs")
    scores = scores_with(0.99, 0.9, 0.7, 0.5)
    method = DACS(confidence=0.0, class_confidence=(0.995, 0.8, 0.6, 0.4, 0, 0, 0))
    assert confident_share(method, recipe, scores) == pytest.approx(0.75)
    pseudo = PseudoLabels(torch.tensor([[[0, 1, IGNORE]]]), torch.tensor([[[0.99, 0.9, 0.0]]]))
    assert method.pseudo_weight(pseudo).item() == pytest.approx(0.5)
    assert GCWLDQ(class_confidence=method.class_confidence).pseudo_weight(pseudo).shape == (1, 1, 3)
    with pytest.raises(RecipeError, match="class_confidence must have 7 numbers, one per class, got 2"):
        load({**small, "method": {"name": "dacs", "class_confidence": [0.9, 0.8]}})
