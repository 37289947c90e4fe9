from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from overfly import train
from overfly.core.errors import DataError, RunError
from overfly.recipe import Recipe, load
from overfly.training.evaluate import assess, recorded, roles
from overfly.training.run import Run


def test_a_run_is_scored_as_its_recipe_says_and_counts_opened_labels(small: dict[str, Any], tmp_path: Path) -> None:
    run = train(load(small, "window=32", "optim.lr=1e-5"), out=tmp_path, device="cpu", quiet=True).run
    domain = run.recipe.domain("target")
    assert recorded(run, "target", "val", domain) is None
    first = assess(run, domain, "target", "val")
    assert first.protocol.window == 32
    assert recorded(run, "target", "val", domain) == first
    whole = assess(run, domain, "target", "val", window=0)
    assert whole.protocol.window is None
    assert recorded(run, "target", "val", domain) is None, "another protocol's score is no answer"
    assert run.scores["labels_opened"] == {"target/val": {"times": 2, "images": 4}}
    assert [row["event"] for row in run.journal.rows() if "event" in row] == ["scored", "scored"]


def test_what_cannot_be_scored(recipe: Recipe, tmp_path: Path) -> None:
    run = Run.place(tmp_path, load(recipe, "target=null"))
    with pytest.raises(RunError, match="no trained network yet"):
        assess(run, run.recipe.domain("source"), "source", "val")
    with pytest.raises(DataError, match="has no target domain"):
        roles(run, "target")
    assert [key for key, _ in roles(run, "both")] == ["source"]
