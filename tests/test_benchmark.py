from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from overfly import benchmark
from overfly.benchmarking import SeedStatistics, expand_recipe_paths
from overfly.commands.arguments import parse_seeds
from overfly.core.errors import RecipeError
from overfly.recipe import load


def test_seed_statistics_are_means_with_deviations() -> None:
    assert SeedStatistics.from_values([0.5, 0.7]).percent() == "60.00 ± 14.14"
    assert SeedStatistics.from_values([0.5]).percent() == "50.00"
    assert SeedStatistics.from_values([None, None]).percent() == "–"
    assert SeedStatistics.from_values([0.5, None]).values == (0.5, None)


def test_benchmark_trains_and_reads_labels_once(small: dict[str, Any], tmp_path: Path) -> None:
    load(small, "steps=2", "optim.lr=1e-5").save(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(
        "start: a.yaml\nsource: {name: synthetic, scene: urban, size: 64, val: 2}\n"
        "target: {name: synthetic, scene: rural, size: 64, val: 2}\nmethod: recalibrate\ncrop: 64\nbatch: 2\nsteps: 2\n"
    )
    runs = tmp_path / "runs"
    settings: dict[str, Any] = {
        "seeds": "2",
        "out": runs,
        "table": tmp_path / "table",
        "size": 64,
        "device": "cpu",
        "quiet": True,
    }
    first = benchmark([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "augment=[]"], **settings)
    assert len(list(runs.glob("*/recipe.yaml"))) == 4
    rows = json.loads((tmp_path / "table" / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["source_only", "recalibrate"]
    assert [row["source"] for row in rows] == ["Urban", "Urban"]
    assert all(len(row["miou"]["Rural"]["values"]) == 2 for row in rows)
    assert [row["labels_opened"] for row in rows] == [2, 2]
    text = (tmp_path / "table" / "table.md").read_text()
    for part in ("### `small_network`", "SGD(lr: 1e-05, momentum: 0.9, weight_decay: 0.0005)", "mIoU (%) (Urban)", "±",
                 "1,535", "1,615", "G.", "p50"):  # fmt: skip
        assert part in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(block) for block in tables] == [4, 4, 4]
    assert all(len({line.count("|") for line in block}) == 1 for block in tables)
    assert all("agriculture" in block[0] for block in tables[1:])
    again = benchmark([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "augment=[]"], **settings)
    assert [row.labels_opened for row in again.table.rows] == [2, 2]
    assert [row.miou for row in again.table.rows] == [row.miou for row in first.table.rows]
    panels = sorted(runs.glob("*/samples/*-val.png"))
    panels[0].unlink()  # as by a process that was killed before it drew them
    benchmark([str(tmp_path / "a.yaml"), "augment=[]"], **settings)
    assert sorted(runs.glob("*/samples/*-val.png")) == panels


def test_invalid_last_recipe_is_reported_before_training(small: dict[str, Any], tmp_path: Path) -> None:
    load(small).save(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("stepps: 1\n")
    with pytest.raises(RecipeError, match=r"b\.yaml"):
        benchmark([str(tmp_path)], out=tmp_path / "runs", device="cpu", quiet=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [0, 1, 2]), ("0,1,5", [0, 1, 5]), ("5,5", [5]), ("2,", [2]), ("0,", [0])]
)
def test_parse_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "", ",", "-1", "many", "1.5"])
def test_invalid_seeds(text: str) -> None:
    with pytest.raises(RecipeError, match="--seeds"):
        parse_seeds(text)


def test_expand_recipe_paths(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).touch()
    both = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    assert (
        expand_recipe_paths([tmp_path])
        == expand_recipe_paths([tmp_path / "*.yaml"])
        == expand_recipe_paths([*both, *both])
        == both
    )
    with pytest.raises(RecipeError, match=r"c\*\.yaml"):
        expand_recipe_paths([tmp_path / "c*.yaml"])


def test_gap_closed_between_source_only_and_oracle(small: dict[str, Any], tmp_path: Path) -> None:
    size = {"name": "synthetic", "size": 64, "train": 4, "val": 2}
    urban, rural = {**size, "scene": "urban"}, {**size, "scene": "rural"}
    load({**small, "source": urban, "target": rural, "steps": 2}).save(tmp_path / "1-before.yaml")
    small = {**small, "optim": {"name": "adamw", "lr": 1e-4}}
    after = {
        **small,
        "start": "1-before.yaml",
        "source": urban,
        "target": rural,
        "method": "multiscale_self_training",
        "steps": 2,
    }
    (tmp_path / "2-after.yaml").write_text(yaml.safe_dump(after))
    load({**small, "source": rural, "target": urban, "steps": 2}).save(tmp_path / "3-oracle.yaml")
    settings: dict[str, Any] = {"seeds": "1", "out": tmp_path / "runs", "size": 64, "device": "cpu", "quiet": True}
    before, own, oracle = benchmark([str(tmp_path)], **settings).table.rows
    assert before.gap_closed is None
    assert oracle.gap_closed is None
    low, middle, high = (row.miou["Rural"].values for row in (before, own, oracle))
    assert own.gap_closed is not None
    for closed, a, b, c in zip(own.gap_closed.values, low, middle, high, strict=True):
        assert a is not None and b is not None and c is not None  # noqa: PT018
        if closed is not None:
            assert closed == pytest.approx((b - a) / (c - a))
        else:
            assert c <= a
    assert "Gap closed by 2-after" in (tmp_path / "runs" / "table.md").read_text()
    alone = benchmark([str(tmp_path / "1-before.yaml"), str(tmp_path / "2-after.yaml")], **settings)
    assert alone.table.rows[1].gap_closed is None
