from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from overfly.adaptation.model_selection import Sight, Verdict, choose, gather, places
from overfly.commands.api import train, validate
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
SIGHT = Sight(limit=2, crop=48)


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
    found = validate([str(runs)], limit=2, crop=48, device="cpu", out=tmp_path / "out")
    verdict = found.verdict
    assert [each.committee for each in verdict.candidates] == sorted(
        (each.committee for each in verdict.candidates), reverse=True
    )
    assert verdict.labels_opened == 0
    assert verdict.study is None
    assert all(each.figures.source_miou is not None for each in verdict.candidates)
    assert verdict.chosen["committee"] == verdict.candidates[0].title
    assert "agreement" not in verdict.chosen
    assert Verdict.model_validate_json((tmp_path / "out" / "validators.json").read_text()) == verdict
    text = shown(found)
    assert "target labels opened: 0" in text
    assert "true mIoU" not in text
    again = choose(gather([runs]), sight=SIGHT)
    assert again == verdict


def test_a_study_opens_labels_counts_them_and_says_whom_to_trust(runs: Path) -> None:
    found = validate([str(runs)], study=True, limit=2, crop=48, device="cpu")
    verdict = found.verdict
    assert verdict.study is not None
    assert verdict.labels_opened == 6
    truth = [each.truth or 0.0 for each in verdict.candidates]
    column = [each.figures.views_miou for each in verdict.candidates]
    assert verdict.study["views_miou"].regret == regret(column, truth)
    assert verdict.study["views_miou"].correlation == spearman(column, truth)
    assert min(trust.regret for trust in verdict.study.values()) >= 0
    opened = [run.scores["labels_opened"]["target/val"] for run in gather([runs])]
    assert sorted(entry["times"] for entry in opened) == [1, 2]
    validate([str(runs)], study=True, limit=2, crop=48, device="cpu")
    assert opened == [run.scores["labels_opened"]["target/val"] for run in gather([runs])], (
        "what is known is not reread"
    )
    kept = next(run for run in gather([runs]) if run.kept)
    assert set(kept.scores["checkpoints"]) == {"step-1", "step-2"}
    text = shown(found)
    assert "rank correlation" in text
    assert "6 opened target labels" in text
    narrow = shown(found, 80)
    assert "…" not in narrow
    assert max(len(line) for line in narrow.splitlines() if line.startswith(("┃", "│"))) <= 80
    for number, each in enumerate(verdict.candidates, 1):
        assert f"{number:>3}  {each.title}\n" in narrow
        assert f"{100 * each.figures.bnm:.2f}" in narrow


def test_estimates_and_agreement_where_asked_for(runs: Path) -> None:
    (single,) = [run for run in gather([runs]) if not run.kept]
    verdict = validate(
        [str(single.path)], estimate=True, reference=str(single.path), limit=2, crop=32, device="cpu", json=True
    )
    values = json.loads(shown(verdict))
    (candidate,) = values["candidates"]
    assert candidate["estimate"]["low"] <= candidate["estimate"]["miou"] <= candidate["estimate"]["high"]
    assert candidate["estimate"]["labels_opened"] == 0
    assert candidate["figures"]["agreement"] > 0
    assert {"expected", "agreement", "committee"} <= set(values["chosen"])


def test_what_cannot_be_validated(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no validator is called 'luck'; there are: entropy"):
        validate([str(runs)], committee=["luck"])
    with pytest.raises(RunError, match="nowhere is not there"):
        validate([str(tmp_path / "nowhere")])
    with pytest.raises(RunError, match="no trained network to choose from"):
        validate([str(tmp_path)])
    with pytest.raises(RecipeError, match="--limit 0 is out of range"):
        validate([str(runs)], limit=0)
    other = Run.place(tmp_path, load({**RECIPE, "target": {**PLACE, "scene": "rural", "size": 96}}))
    with pytest.raises(RecipeError, match="have different targets"):
        choose([*gather([runs]), other])
    with pytest.raises(RecipeError, match="none of these runs has a target"):
        choose([Run.place(tmp_path, load({**RECIPE, "target": None}))])
