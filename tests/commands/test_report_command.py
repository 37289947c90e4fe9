from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import overfly
from overfly.core.errors import RecipeError, RunError
from overfly.recipe import Recipe, load
from overfly.training.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapted run, its baselines and their comparison, and a run without a target; the others are scored."""
    out = tmp_path_factory.mktemp("runs")
    domain = {"name": "synthetic", "size": 64, "train": 4, "val": 3, "test": 2}
    small: dict[str, Any] = {
        "source": {**domain, "scene": "urban"}, "target": {**domain, "scene": "rural"}, "model": "small_network",
        "optim": {"name": "sgd", "lr": 0.01}, "crop": 64, "batch": 2, "steps": 2,
    }  # fmt: skip
    adapted = load({**small, "start": small, "method": {"name": "multiscale_self_training", "statistics": "joint"}})
    overfly.adapt(adapted, out=out, device="cpu", quiet=True, estimate=False)
    alone = {key: value for key, value in small.items() if key != "target"}
    overfly.train(load({**alone, "seed": 1}), out=out, device="cpu", quiet=True)
    for run in all_runs(out):
        if run.recipe.target is not None:
            overfly.evaluate(run.path, device="cpu", samples=False)
    return out


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def all_runs(folder: Path) -> list[Run]:
    return [Run(file.parent) for file in sorted(folder.glob("*/recipe.yaml"))]


def _opened(folder: Path) -> dict[str, int]:
    result = {run.path.name: run.scores.get("labels_opened", {}).get("target/val", {}) for run in all_runs(folder)}
    return {name: counts.get("times", 0) for name, counts in result.items()}


def test_report_shows_all_runs_and_counts_the_labels_opened(copied: Path, tmp_path: Path) -> None:
    before = _opened(copied)
    result = overfly.report([str(copied)], out=tmp_path / "r.html", device="cpu", size=64)
    after = _opened(copied)
    text = (tmp_path / "r.html").read_text()
    assert result.recipes == 6
    assert result.labels_opened == 15
    assert sum(after.values()) - sum(before.values()) == 4
    for words in (
        "source only, Urban to Rural",
        "recalibrate, Urban to Rural",
        "multiscale self training, Urban to Rural",
    ):
        assert text.count(words) > 4
    for words in ("Selection without target labels", "worst", "best", "labels read for this choice: 12", "agriculture"):
        assert words in text
    names = [row["target/val"]["miou"] for row in (run.scores for run in all_runs(copied)) if "target/val" in row]
    assert len(names) == 5
    assert all(f"{100 * value:.2f}" in text for value in names)
    assert len(text) < 5_000_000
    assert "small_network" in text
    assert list(tmp_path.glob(".r.html*")) == []


def test_no_labels_opens_none(copied: Path, tmp_path: Path) -> None:
    before = _opened(copied)
    result = overfly.report([str(copied)], out=tmp_path / "r.html", labels=False, speed=False, device="cpu")
    assert result.labels_opened == 0
    assert _opened(copied) == before
    text = (tmp_path / "r.html").read_text()
    assert "labels were not opened" in text
    assert "<img" in text


def test_report_of_one_run_and_of_missing_data(copied: Path, tmp_path: Path) -> None:
    (alone,) = [run for run in all_runs(copied) if run.recipe.target is None]
    result = overfly.report([str(alone.path)], out=tmp_path / "r.html", speed=False, device="cpu")
    assert (result.recipes, result.labels_opened) == (1, 3)
    values = alone.recipe.model_dump(mode="json")
    values["source"] = {"name": "loveda", "root": str(tmp_path / "gone"), "scene": "urban"}
    Recipe.model_validate(values).save(alone.path / "recipe.yaml")
    overfly.report([str(alone.path)], out=tmp_path / "r.html", speed=False, device="cpu")
    text = (tmp_path / "r.html").read_text()
    assert "No images: " in text
    assert "gone" in text


def test_report_refuses_other_folders_and_files(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(RunError, match=re.escape(str(tmp_path))):
        overfly.report([str(tmp_path)], out=tmp_path / "r.html")
    with pytest.raises(RecipeError, match="--out"):
        overfly.report([str(runs)], out=tmp_path / "no" / "r.html")
    with pytest.raises(RecipeError, match=r"recipe\.html"):
        overfly.report([str(runs)], out=tmp_path / "recipe.yaml")
    assert list(tmp_path.glob("*.html")) == []


def test_damaged_selection_is_named(copied: Path, tmp_path: Path) -> None:
    (file,) = copied.glob("*/selection.json")
    file.write_text("{}")
    with pytest.raises(RunError, match=re.escape(str(file))):
        overfly.report([str(copied)], out=tmp_path / "r.html", speed=False, images=0, device="cpu")


def test_report_of_a_comparison_shows_its_candidates(copied: Path, tmp_path: Path) -> None:
    (comparison,) = copied.glob("*_comparison")
    result = overfly.report([str(comparison)], out=tmp_path / "r.html", speed=False, images=0, device="cpu")
    assert result.recipes == 5
    assert comparison.name in (tmp_path / "r.html").read_text()
