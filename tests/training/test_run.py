from __future__ import annotations

from pathlib import Path

import pytest

from overfly.core.errors import RunError
from overfly.recipe import Recipe, load
from overfly.training.run import Run, RunLog


def test_open_refuses_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=str(tmp_path / "no")):
        Run.open(tmp_path / "no")
    with pytest.raises(RunError, match=r"recipe\.yaml"):
        Run.open(tmp_path)


def test_run_of_an_older_format_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    (run.path / "machine.json").write_text("{}")
    with pytest.raises(RunError, match=run.path.name):
        Run.open(run.path)
    assert Run.find(tmp_path, recipe) is None


def test_run_is_found_by_its_recipe(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    renamed = run.path.rename(tmp_path / "my best run")
    assert Run.open_or_create(tmp_path, recipe).path == renamed
    assert Run.open_or_create(tmp_path, load(recipe, "seed=1")).path != renamed
    with pytest.raises(RunError, match="my best run"):
        Run(renamed).segmenter()


def test_invalid_recipe_in_a_run(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    (run.path / "recipe.yaml").write_text("steps: many")
    with pytest.raises(RunError, match=r"recipe\.yaml .*steps"):
        _ = Run.open(run.path).recipe


def test_log_skips_an_incomplete_line_and_rewinds(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in log.rows()] == [1, 2, 3]
    log.rewind(2)
    assert log.path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 1.0}\n'


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    log = RunLog(tmp_path / "log.jsonl", tmp_path / "tb")
    log.write(1, loss=0.5)
    assert list((tmp_path / "tb").glob("events.*"))


@pytest.mark.parametrize("text", ["[1]", '{"target/val": 3}'])
def test_damaged_scores_raise_run_error(recipe: Recipe, tmp_path: Path, text: str) -> None:
    run = Run.open_or_create(tmp_path, recipe)
    (run.path / "scores.json").write_text(text)
    with pytest.raises(RunError, match=r"scores\.json"):
        _ = run.scores
