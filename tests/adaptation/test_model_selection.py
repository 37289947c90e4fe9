from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from overfly import rank, train
from overfly.adaptation.model_selection import (
    Ranking,
    find_trained_runs,
    highest,
    list_checkpoints,
    mean_ranks,
    rank_correlation,
)
from overfly.adaptation.model_selection import rank as rank_runs
from overfly.core.errors import DataError, RecipeError, RunError
from overfly.core.records import Item, UInt8
from overfly.data.synthetic import Synthetic
from overfly.evaluation.images import MetricOptions, unlabeled_images
from overfly.evaluation.label_free_metrics import balanced_miou, consensus, predict_probabilities
from overfly.evaluation.scores import Confusion
from overfly.recipe import load
from overfly.training.run import Run
from planted import ByLevel, Constant, Patches

DOMAIN = {"name": "synthetic", "size": 64, "train": 3, "val": 2, "test": 2}
RECIPE: dict[str, Any] = {
    "source": {**DOMAIN, "scene": "urban"},
    "target": {**DOMAIN, "scene": "rural"},
    "optim": {"name": "sgd", "lr": 1e-5},
    "crop": 64,
    "batch": 2,
    "steps": 2,
}
OPTIONS = MetricOptions(limit=2, crop=48)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with two stored checkpoints, the last of which is its final network, and one without any."""
    out = tmp_path_factory.mktemp("runs")
    validation = {"every": 1, "target": True, "keep_all": True, "select": "last"}
    train(load({**RECIPE, "validation": validation}), out=out, device="cpu", quiet=True)
    train(load({**RECIPE, "seed": 1}), out=out, device="cpu", quiet=True)
    return out


def shown(value: object, width: int = 300) -> str:
    console = Console(width=width, file=io.StringIO(), soft_wrap=True, highlight=False)
    with console.capture() as captured:
        console.print(value)
    return captured.get()


def test_every_checkpoint_is_listed_once(runs: Path) -> None:
    found = list_checkpoints(find_trained_runs([runs]))
    assert sorted(each.name for each in found) == [
        "final",
        "final",
        "step 1",
        "step 2",
    ]  # with own statistics
    assert find_trained_runs([runs, *runs.glob("*/")]) != []
    assert len(find_trained_runs([runs, *runs.glob("*/")])) == 2


def test_candidates_are_ranked_without_a_target_label(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Synthetic.read_label

    def guarded(self: Synthetic, item: Item) -> UInt8:
        if self.scene == "rural":
            raise DataError("a label of the target was opened")
        return original(self, item)

    monkeypatch.setattr(Synthetic, "read_label", guarded)
    found = rank([str(runs)], limit=2, crop=48, device="cpu", out=tmp_path / "out")
    ranking = found.ranking
    assert [each.mean_rank for each in ranking.candidates] == sorted(
        (each.mean_rank for each in ranking.candidates), reverse=True
    )
    assert ranking.labels_opened == 0
    assert ranking.quality is None
    assert all(each.metrics.source_miou is not None for each in ranking.candidates)
    assert ranking.best["mean_rank"] == ranking.candidates[0].title
    assert "agreement" not in ranking.best
    assert Ranking.model_validate_json((tmp_path / "out" / "ranking.json").read_text()) == ranking
    text = shown(found)
    assert "target labels opened: 0" in text
    assert "target mIoU" not in text
    again = rank_runs(find_trained_runs([runs]), options=OPTIONS)
    assert again == ranking


def test_with_labels_each_validator_gets_correlation_and_regret(runs: Path) -> None:
    found = rank([str(runs)], with_labels=True, limit=2, crop=48, device="cpu")
    ranking = found.ranking
    assert ranking.quality is not None
    assert ranking.labels_opened == 8
    truth = [each.target_miou or 0.0 for each in ranking.candidates]
    column = [each.metrics.views_miou or 0.0 for each in ranking.candidates]
    assert ranking.quality["views_miou"].regret == max(truth) - truth[column.index(max(column))]
    assert ranking.quality["views_miou"].correlation == rank_correlation(column, truth)
    assert min(quality.regret for quality in ranking.quality.values()) >= 0
    opened = [run.scores["labels_opened"]["target/val"] for run in find_trained_runs([runs])]
    assert sorted(entry["times"] for entry in opened) == [1, 3]
    rank([str(runs)], with_labels=True, limit=2, crop=48, device="cpu")
    assert opened == [run.scores["labels_opened"]["target/val"] for run in find_trained_runs([runs])], (
        "what is known is not reread"
    )
    run = next(run for run in find_trained_runs([runs]) if run.validation_weights)
    assert set(run.scores["checkpoints"]) == {"step-1", "step-2"}
    text = shown(found)
    assert "rank correlation" in text
    assert "target labels opened: 8" in text
    narrow = shown(found, 80)
    assert "…" not in narrow
    assert max(len(line) for line in narrow.splitlines() if line.startswith(("┃", "│"))) <= 80
    for number, each in enumerate(ranking.candidates, 1):
        assert f"{number:>3}  {each.title}\n" in narrow
        assert f"{100 * each.metrics.score:.2f}" in narrow
        assert f"{100 * each.metrics.nuclear_norm:.2f}" in text
    assert "other metrics: --json" in narrow


def test_estimates_and_agreement_are_computed_on_request(runs: Path) -> None:
    (single,) = [run for run in find_trained_runs([runs]) if not run.validation_weights]
    ranking = rank(
        [str(single.path)], estimate=True, reference=str(single.path), limit=2, crop=32, device="cpu", json=True
    )
    values = json.loads(shown(ranking))
    (candidate,) = values["candidates"]
    assert candidate["estimate"]["low"] <= candidate["estimate"]["miou"] <= candidate["estimate"]["high"]
    assert candidate["metrics"]["agreement"] > 0
    assert {"expected", "agreement", "mean_rank"} <= set(values["best"])


def test_invalid_options_raise(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="luck"):
        rank([str(runs)], validators=["luck"])
    with pytest.raises(RunError, match="nowhere"):
        rank([str(tmp_path / "nowhere")])
    with pytest.raises(RunError, match=re.escape(str(tmp_path))):
        rank([str(tmp_path)])
    with pytest.raises(RecipeError, match="--limit"):
        rank([str(runs)], limit=0)
    other = Run.open_or_create(tmp_path, load({**RECIPE, "target": {**DOMAIN, "scene": "rural", "size": 96}}))
    with pytest.raises(RecipeError, match="target"):
        rank_runs([*find_trained_runs([runs]), other])
    with pytest.raises(RecipeError, match="target"):
        rank_runs([Run.open_or_create(tmp_path, load({**RECIPE, "target": None}))])


def consensus_of(*candidates: nn.Module) -> list[list[Confusion]]:
    images = list(unlabeled_images(Patches(), "train"))
    return consensus(predict_probabilities(network, images, MetricOptions()) for network in candidates)


def miou(pairs: list[Confusion]) -> float:
    return balanced_miou(sum(pairs[1:], pairs[0]))


def test_consensus_is_lowest_for_the_network_that_differs() -> None:
    networks = (ByLevel(20), ByLevel(10), ByLevel(20, (1, 0, 2)), Constant(3.0))
    right, same, exchanged, collapsed = map(miou, consensus_of(*networks))
    assert right == same == pytest.approx(1.0)
    assert exchanged < 0.7
    assert collapsed < 0.4


def test_two_networks_have_no_consensus() -> None:
    assert consensus_of(ByLevel(), Constant()) == [[], []]


def test_consensus_uses_each_networks_window_and_restores_its_mode() -> None:
    images = list(unlabeled_images(Patches(), "train"))
    trained = ByLevel(20).train()
    networks = ((trained, None), (ByLevel(10), 16), (ByLevel(5), None))
    whole = consensus(
        predict_probabilities(network, images, MetricOptions(window=window)) for network, window in networks
    )
    assert trained.training
    assert [miou(pairs) for pairs in whole] == pytest.approx([1.0, 1.0, 1.0])


def test_mean_ranks_ignore_scales_and_incomplete_validators() -> None:
    candidates = [{"a": 0.1, "b": 900.0}, {"a": 0.2, "b": 100.0}, {"a": 0.3, "b": 800.0}]
    assert mean_ranks(candidates, ["a"]) == [0, 0.5, 1]
    assert mean_ranks(candidates, ["a", "b"]) == [0.5, 0.25, 0.75]
    missing: list[dict[str, float | None]] = [{"a": 0.1, "b": 9.0}, {"a": 0.2, "b": 1.0}, {"a": 0.3, "b": None}]
    assert mean_ranks(missing, ["a", "b"]) == [0, 0.5, 1]
    assert mean_ranks(candidates, ["c"]) == [0.5, 0.5, 0.5]
    assert mean_ranks(candidates[:1], ["a"]) == [0.5]


def test_rank_correlation_shares_ranks_of_equal_values() -> None:
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4 give 4.5 / sqrt(4.5 * 5)
    assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / 22.5**0.5)
    assert rank_correlation([1], [2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_highest_is_the_first_of_equals() -> None:
    assert highest([0.2, None, 0.7, 0.7]) == 2
    assert highest([-0.2, None, -0.1]) == 2
    assert highest([None, None]) is None
