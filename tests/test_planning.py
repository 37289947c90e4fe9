"""Plans of benchmarks: runs, steps, missing files, time; the recipes of pairs of public data sets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import REPOSITORY
from miniatures import WRITERS
from overfly import benchmark, train
from overfly.benchmarking import PlannedTraining, plan_benchmark
from overfly.commands import train as train_command
from overfly.core.errors import WeightsError, render_text
from overfly.recipe import Recipe, load

PAIRS = sorted((REPOSITORY / "recipes" / "pairs").glob("*.yaml"))


def printed(training: PlannedTraining) -> str:
    return render_text(Path(train_command.__file__).with_name("plan.txt.jinja"), plan=[training]).splitlines()[0]


def plan(
    recipes: list[Path],
    *overrides: str,
    out: Path,
    seeds: int = 1,
    step: float = 1.0,
    timed: list[Recipe] | None = None,
) -> list[PlannedTraining]:
    def time_step(recipe: Recipe) -> float:
        if timed is not None:
            timed.append(recipe)
        return step

    return plan_benchmark(recipes, overrides, range(seeds), out=out, split="val", time_step=time_step)


def roots(path: Path, root: Path) -> list[str]:
    recipe = load(path)
    return [f"{role}.root={root / recipe.domain(role).name}" for role in ("source", "target")]


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_recipes_of_pairs_read_the_published_layouts(path: Path, root: Path, tmp_path: Path) -> None:
    for training in plan([path], *roots(path, root), out=tmp_path):
        assert training.missing == ()


def test_start_and_seeds_are_planned_once(tmp_path: Path) -> None:
    adapted, source_only = (
        REPOSITORY / "recipes" / "pairs" / name for name in ("gta5-cityscapes.yaml", "gta5-cityscapes-source_only.yaml")
    )
    timed: list[Recipe] = []
    first, second = plan([adapted, source_only], out=tmp_path, seeds=3, step=0.5, timed=timed)
    assert (first.name, first.runs, first.steps, first.seconds) == ("gta5-cityscapes", 3, 10_000, 15_000)
    assert (second.name, second.runs, second.seconds) == ("start of gta5-cityscapes", 3, 30_000)
    assert len(first.missing) == 2
    assert "data/gta5 is not a folder; GTA5 has images/*.png and labels/*.png below its root" in first.missing[0]
    assert "https://www.cityscapes-dataset.com" in first.missing[1]
    assert [recipe.model.weights for recipe in timed] == [None, None]
    assert printed(first) == "gta5-cityscapes: 3 runs of 10000 steps, about 4.2 h"


def test_equal_trainings_of_pairs_are_timed_once(tmp_path: Path) -> None:
    timed: list[Recipe] = []
    plans = plan([path for path in PAIRS if "vaihingen" in path.stem], out=tmp_path, timed=timed)
    assert len(plans) == 8
    assert len(timed) == 2
    timed.clear()
    assert len(plan(PAIRS, out=tmp_path, timed=timed)) == len(PAIRS)
    assert len(timed) == 4  # source-only and adapted, aerial and street


def test_a_missing_split_to_score_is_missing(tmp_path: Path) -> None:
    for name in ("gta5", "cityscapes"):
        WRITERS[name](tmp_path / name)
    shutil.rmtree(tmp_path / "cityscapes/leftImg8bit/val")
    path = REPOSITORY / "recipes" / "pairs" / "gta5-cityscapes-source_only.yaml"
    (only,) = plan([path], *roots(path, tmp_path), out=tmp_path)
    assert len(only.missing) == 1
    assert "leftImg8bit/val/*/*_leftImg8bit.png matches no files" in only.missing[0]


def test_missing_weights_and_unknown_lengths(tmp_path: Path) -> None:
    path = REPOSITORY / "recipes" / "loveda" / "pidnet_s-urban-ohem.yaml"
    (only,) = plan([path], "model.weights=gone.pth", out=tmp_path)
    assert (only.steps, only.seconds) == (None, None)
    assert only.missing[-1] == "weights gone.pth do not exist"
    assert "run: overfly data fetch loveda --root data/loveda" in only.missing[0]
    assert "duration unknown" in printed(only)


def test_the_dry_run_trains_nothing(tmp_path: Path) -> None:
    small = ["source={name: synthetic, size: 64, train: 3, val: 1, test: 1}", "crop=64", "batch=2", "steps=2"]
    file = tmp_path / "small.yaml"
    Recipe(source={"name": "synthetic"}, model={"name": "small_network", "weights": None}).save(file)
    out = tmp_path / "runs"
    result = benchmark([file, *small], seeds="2", out=out, device="cpu", quiet=True, dry_run=True)
    assert not out.exists()
    assert (result.exit_status, len(result.table.rows)) == (0, 0)
    assert (result.plan[0].runs, result.plan[0].steps) == (2, 2)
    assert result.plan[0].seconds is not None
    assert 0 < result.plan[0].seconds < 60
    train(load(file, *small, "seed=0"), out=out, device="cpu", quiet=True)
    again = benchmark([file, *small], seeds="2", out=out, device="cpu", quiet=True, dry_run=True)
    assert (again.plan[0].runs, again.plan[0].done) == (1, 1)
    pair = REPOSITORY / "recipes/pairs/cityscapes-acdc.yaml"
    missing = benchmark(
        [pair, "model=small_network", "crop=64", f"source.root={tmp_path / 'none'}"],
        seeds="1", out=out, device="cpu", quiet=True, dry_run=True,
    )  # fmt: skip
    assert missing.exit_status == 1


def test_a_method_whose_file_is_missing_has_no_time(tmp_path: Path) -> None:
    def fail(recipe: Recipe) -> float:
        raise WeightsError(f"{recipe.method.name} has no teacher")

    plans = plan_benchmark([PAIRS[0]], [], [0], out=tmp_path, split="val", time_step=fail)
    assert {training.seconds for training in plans} == {None}
