from __future__ import annotations

from pathlib import Path

import pytest

from overfly.core.errors import RunError
from overfly.recipe import Recipe, load
from overfly.training.run import Run, RunLog


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no"):
        Run.open(tmp_path / "no")
    with pytest.raises(RunError, match=r"no recipe\.yaml"):
        Run.open(tmp_path)


def test_a_run_of_an_older_version_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    (run.path / "machine.json").write_text("{}")
    with pytest.raises(RunError, match="older version"):
        Run.open(run.path)
    assert Run.find(tmp_path, recipe) is None


def test_a_run_is_found_by_its_recipe_alone(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    renamed = run.path.rename(tmp_path / "my best run")
    assert Run.open_or_create(tmp_path, recipe).path == renamed
    assert Run.open_or_create(tmp_path, load(recipe, "seed=1")).path != renamed
    with pytest.raises(RunError, match="has no trained network yet"):
        Run(renamed).segmenter()


def test_a_spoilt_recipe_is_named(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    (run.path / "recipe.yaml").write_text("steps: many")
    with pytest.raises(RunError, match=r"recipe\.yaml cannot be used: .*steps"):
        _ = Run.open(run.path).recipe


def test_the_log_leaves_out_what_was_cut_off_and_rewinds(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in log.rows()] == [1, 2, 3]
    log.rewind(2)
    assert log.path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 1.0}\n'


def test_figures_reach_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    log = RunLog(tmp_path / "log.jsonl", tmp_path / "tb")
    log.write(1, loss=0.5)
    assert list((tmp_path / "tb").glob("events.*"))


@pytest.mark.parametrize("text", ["[1]", '{"target/val": 3}'])
def test_damaged_scores_are_told(recipe: Recipe, tmp_path: Path, text: str) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    (run.path / "scores.json").write_text(text)
    with pytest.raises(RunError, match=r"scores\.json is damaged"):
        _ = run.scores
