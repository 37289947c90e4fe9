from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from overfly import rank, train
from overfly.adaptation.model_selection import Ranking, TargetImages, gather, places
from overfly.adaptation.model_selection import rank as rank_runs
from overfly.core.errors import DataError, RecipeError, RunError
from overfly.core.records import Item, UInt8
from overfly.data.synthetic.domain import Synthetic
from overfly.evaluation.ranking import regret, spearman
from overfly.recipe import load
from overfly.training.run import Run

PLACE = {"name": "synthetic", "size": 64, "train": 3, "val": 2, "test": 2}
RECIPE: dict[str, Any] = {
    "source": {**PLACE, "scene": "urban"},
    "target": {**PLACE, "scene": "rural"},
    "optim": {"name": "sgd", "lr": 1e-5},
    "crop": 64,
    "batch": 2,
    "steps": 2,
}
SIGHT = TargetImages(limit=2, crop=48)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with two kept checkpoints, of which the last is its own, and one without any."""
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


def test_every_network_is_a_candidate_once(runs: Path) -> None:
    found = places(gather([runs]))
    assert sorted(place.checkpoint for place in found) == ["final", "step 1", "step 2, final"]
    assert gather([runs, *runs.glob("*/")]) != []
    assert len(gather([runs, *runs.glob("*/")])) == 2


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
    assert [each.committee for each in ranking.candidates] == sorted(
        (each.committee for each in ranking.candidates), reverse=True
    )
    assert ranking.labels_opened == 0
    assert ranking.study is None
    assert all(each.metrics.source_miou is not None for each in ranking.candidates)
    assert ranking.chosen["committee"] == ranking.candidates[0].title
    assert "agreement" not in ranking.chosen
    assert Ranking.model_validate_json((tmp_path / "out" / "validators.json").read_text()) == ranking
    text = shown(found)
    assert "target labels opened: 0" in text
    assert "true mIoU" not in text
    again = rank_runs(gather([runs]), sight=SIGHT)
    assert again == ranking


def test_a_study_opens_labels_counts_them_and_says_whom_to_trust(runs: Path) -> None:
    found = rank([str(runs)], with_labels=True, limit=2, crop=48, device="cpu")
    ranking = found.ranking
    assert ranking.study is not None
    assert ranking.labels_opened == 6
    truth = [each.truth or 0.0 for each in ranking.candidates]
    column = [each.metrics.views_miou for each in ranking.candidates]
    assert ranking.study["views_miou"].regret == regret(column, truth)
    assert ranking.study["views_miou"].correlation == spearman(column, truth)
    assert min(trust.regret for trust in ranking.study.values()) >= 0
    opened = [run.scores["labels_opened"]["target/val"] for run in gather([runs])]
    assert sorted(entry["times"] for entry in opened) == [1, 2]
    rank([str(runs)], with_labels=True, limit=2, crop=48, device="cpu")
    assert opened == [run.scores["labels_opened"]["target/val"] for run in gather([runs])], (
        "what is known is not reread"
    )
    kept = next(run for run in gather([runs]) if run.validation_weights)
    assert set(kept.scores["checkpoints"]) == {"step-1", "step-2"}
    text = shown(found)
    assert "rank correlation" in text
    assert "6 opened target labels" in text
    narrow = shown(found, 80)
    assert "…" not in narrow
    assert max(len(line) for line in narrow.splitlines() if line.startswith(("┃", "│"))) <= 80
    for number, each in enumerate(ranking.candidates, 1):
        assert f"{number:>3}  {each.title}\n" in narrow
        assert f"{100 * each.metrics.nuclear_norm:.2f}" in narrow


def test_estimates_and_agreement_where_asked_for(runs: Path) -> None:
    (single,) = [run for run in gather([runs]) if not run.validation_weights]
    ranking = rank(
        [str(single.path)], estimate=True, reference=str(single.path), limit=2, crop=32, device="cpu", json=True
    )
    values = json.loads(shown(ranking))
    (candidate,) = values["candidates"]
    assert candidate["estimate"]["low"] <= candidate["estimate"]["miou"] <= candidate["estimate"]["high"]
    assert candidate["estimate"]["labels_opened"] == 0
    assert candidate["metrics"]["agreement"] > 0
    assert {"expected", "agreement", "committee"} <= set(values["chosen"])


def test_what_cannot_be_validated(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no validator is called 'luck'; there are: entropy"):
        rank([str(runs)], committee=["luck"])
    with pytest.raises(RunError, match="nowhere is not there"):
        rank([str(tmp_path / "nowhere")])
    with pytest.raises(RunError, match="no trained network to choose from"):
        rank([str(tmp_path)])
    with pytest.raises(RecipeError, match="--limit 0 is out of range"):
        rank([str(runs)], limit=0)
    other = Run.open_or_create(tmp_path, load({**RECIPE, "target": {**PLACE, "scene": "rural", "size": 96}}))
    with pytest.raises(RecipeError, match="have different targets"):
        rank_runs([*gather([runs]), other])
    with pytest.raises(RecipeError, match="none of these runs has a target"):
        rank_runs([Run.open_or_create(tmp_path, load({**RECIPE, "target": None}))])
